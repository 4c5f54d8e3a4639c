"""Random small Transformers and random plans; the models say themselves what sharing maps means.

`Transformer.run` takes the leaders explicitly and computes every map in the open. It is a second definition of reuse,
written without fxreuse.
"""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

WINDOW = 2


@dataclasses.dataclass(frozen=True)
class Spec:
    """A Transformer. ``alternating`` masks a window in every other layer; ``relative`` adds a learned bias."""

    layers: int = 2
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 4
    norm: str = "pre"
    projection: str = "split"
    score: str = "sdpa"
    mask: str = "none"
    padding: str = "none"
    relative: bool = False
    bias: bool = True
    cross: bool = False
    rotary: bool = False
    normed: bool = False
    dropout: float = 0.1

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def windowed(self, layer: int) -> bool:
        return self.mask == "window" or (self.mask == "alternating" and layer % 2 == 1)

    def inputs(self, batch: int, queries: int, keys: int) -> dict[str, torch.Tensor]:
        inputs = {"x": torch.randn(batch, queries, self.width)}
        if self.cross:
            inputs["context"] = torch.randn(batch, keys, self.width)
        if self.padding != "none":
            length = keys if self.cross else queries
            inputs["mask"] = torch.ones(batch, length, dtype=torch.long)
            inputs["mask"][-1, 1 + length // 2 :] = 0
        return inputs


class Attention(torch.nn.Module):
    def __init__(self, spec: Spec, windowed: bool) -> None:
        super().__init__()
        self.spec, self.windowed = spec, windowed
        width, kv_width = spec.width, spec.kv_heads * spec.head_dim
        if spec.projection == "split" or spec.cross:
            self.q = torch.nn.Linear(width, width, bias=spec.bias)
            self.k = torch.nn.Linear(width, kv_width, bias=spec.bias)
            self.v = torch.nn.Linear(width, kv_width, bias=spec.bias)
        else:
            self.qkv = torch.nn.Linear(width, width + 2 * kv_width, bias=spec.bias)
        if spec.normed:
            self.q_norm, self.k_norm = torch.nn.LayerNorm(spec.head_dim), torch.nn.LayerNorm(spec.head_dim)
        if spec.relative:
            self.distances = torch.nn.Parameter(torch.randn(spec.heads, 2 * WINDOW + 1))
        self.out = torch.nn.Linear(width, width, bias=spec.bias)

    def project(self, x: torch.Tensor, context: torch.Tensor | None) -> list[torch.Tensor]:
        """Q, K and V of shape (batch, heads, tokens, head_dim), in the layout that the spec asks for."""
        heads, kv_heads, dim = self.spec.heads, self.spec.kv_heads, self.spec.head_dim
        source = x if context is None else context
        if not hasattr(self, "qkv"):
            parts = [self.q(x), self.k(source), self.v(source)]
        elif self.spec.projection == "chunk":
            parts = list(self.qkv(x).chunk(3, dim=-1))
        elif self.spec.projection == "sizes":
            parts = list(self.qkv(x).split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1))
        elif self.spec.projection == "unbind":
            parts = list(self.qkv(x).view(x.shape[0], x.shape[1], 3, heads, dim).unbind(2))
        else:  # interleaved: q, k and v of the first head, then of the second
            parts = list(self.qkv(x).view(x.shape[0], x.shape[1], heads, 3 * dim).chunk(3, dim=-1))
        q, k, v = (part.reshape(part.shape[0], part.shape[1], -1, dim).transpose(1, 2) for part in parts)
        if self.spec.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        return [rotate(q), rotate(k), v] if self.spec.rotary else [q, k, v]

    def addend(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """What is added to the scores: a learned bias and an additive padding mask."""
        total = None
        if self.spec.relative:
            rows, columns = positions(q)[:, None], positions(k)[None, :]
            total = self.distances[:, (columns - rows).clamp(-WINDOW, WINDOW) + WINDOW][None]
        if self.spec.padding == "additive" and mask is not None:
            padding = (1.0 - mask[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
            total = padding if total is None else total + padding
        return total

    def allowed(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Where a query may look, as booleans."""
        rows, columns = positions(q)[:, None], positions(k)[None, :]
        total = None
        if self.windowed:
            total = (rows - columns).abs() <= WINDOW
        elif self.spec.mask == "causal":
            total = columns <= rows
        if self.spec.padding == "bool" and mask is not None:
            padding = mask[:, None, None, :].bool()
            total = padding if total is None else total & padding
        return total

    def map(self, x: torch.Tensor, context: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
        """The attention map, in the open."""
        q, k, _ = self.project(x, context)
        k = k.repeat_interleave(self.spec.heads // self.spec.kv_heads, dim=1)
        if self.spec.score == "bmm":
            flat = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
            scores = flat.view(q.shape[0], q.shape[1], q.shape[2], k.shape[2]) * self.spec.head_dim**-0.5
        else:
            scores = q @ k.transpose(2, 3) / self.spec.head_dim**0.5
        addend, allowed = self.addend(q, k, mask), self.allowed(q, k, mask)
        scores = scores if addend is None else scores + addend
        scores = scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))
        return scores.softmax(-1)

    def use(self, probs: torch.Tensor, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """What a map makes of this layer's values."""
        v = self.project(x, context)[2].repeat_interleave(self.spec.heads // self.spec.kv_heads, dim=1)
        probs = F.dropout(probs, self.spec.dropout, self.training)
        if self.spec.score == "bmm":
            return self.merge(torch.bmm(probs.flatten(0, 1), v.flatten(0, 1)).view(*probs.shape[:3], -1))
        return self.merge(probs @ v)

    def merge(self, heads: torch.Tensor) -> torch.Tensor:
        return self.out(heads.transpose(1, 2).reshape(heads.shape[0], heads.shape[2], -1))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
        if self.spec.score != "sdpa":
            return self.use(self.map(x, context, mask), x, context)
        q, k, v = self.project(x, context)
        addend, allowed = self.addend(q, k, mask), self.allowed(q, k, mask)
        if addend is not None and allowed is not None:
            addend = addend.masked_fill(~allowed, float("-inf"))
        rate = self.spec.dropout if self.training else 0.0
        grouped = self.spec.kv_heads != self.spec.heads
        if self.spec.mask == "causal" and addend is None and self.spec.padding == "none":
            return self.merge(
                F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True, enable_gqa=grouped)
            )
        attn_mask = allowed if addend is None else addend
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask, rate, enable_gqa=grouped))


class Layer(torch.nn.Module):
    def __init__(self, spec: Spec, windowed: bool) -> None:
        super().__init__()
        self.pre = spec.norm == "pre"
        self.attention = Attention(spec, windowed)
        self.norm1, self.norm2 = torch.nn.LayerNorm(spec.width), torch.nn.LayerNorm(spec.width)
        self.up, self.down = torch.nn.Linear(spec.width, 10), torch.nn.Linear(10, spec.width)
        self.dropout = torch.nn.Dropout(spec.dropout)

    def forward(self, x, context, mask, attend=None):  # type: ignore[no-untyped-def]
        attend = self.attention if attend is None else attend
        if self.pre:
            x = x + self.dropout(attend(self.norm1(x), context, mask))
            return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))
        x = self.norm1(x + self.dropout(attend(x, context, mask)))
        return self.norm2(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Transformer(torch.nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.layers = torch.nn.ModuleList(Layer(spec, spec.windowed(i)) for i in range(spec.layers))
        self.norm = torch.nn.LayerNorm(spec.width)

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, context, mask)
        return self.norm(x)

    def run(
        self,
        leaders: tuple[int, ...],
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the model is under a plan: layer ``i`` uses the map of layer ``leaders[i]``, its values are its own."""
        maps: dict[int, torch.Tensor] = {}
        for i, layer in enumerate(self.layers):

            def attend(h, context, mask, i=i, attention=layer.attention):  # type: ignore[no-untyped-def]
                if leaders[i] == i:
                    maps[i] = attention.map(h, context, mask)
                return attention.use(maps[leaders[i]], h, context)

            x = layer(x, context, mask, attend)
        return self.norm(x)


def positions(operand: torch.Tensor) -> torch.Tensor:
    return torch.arange(operand.shape[2], device=operand.device)


def rotate(operand: torch.Tensor) -> torch.Tensor:
    """Rotary positions: pairs of channels turn with the position."""
    half = operand.shape[3] // 2
    speed = torch.arange(1, half + 1, device=operand.device, dtype=operand.dtype) ** -1.0
    angle = positions(operand).to(operand.dtype)[:, None] * speed
    a, b = operand[..., :half], operand[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


@st.composite
def specs(draw: st.DrawFn, **fixed: object) -> Spec:
    """A spec in which every query has a key to look at. Features are rare enough for a capture to stay quick."""
    rarely = st.sampled_from([False, False, True])
    heads = draw(st.integers(1, 4))
    cross = draw(rarely)
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    layouts = ["split", "sizes"] if kv_heads != heads else ["split", "sizes", "chunk", "unbind", "interleaved"]
    masks = ["none", "window", "alternating", "causal"]
    mask = draw(st.sampled_from(masks[:1] if cross else masks))
    paddings = ["none"] if mask in ("window", "alternating") else ["none", "bool", "additive"]
    found = Spec(
        layers=draw(st.sampled_from([3, 2, 2, 3, 4])),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        norm=draw(st.sampled_from(["pre", "post"])),
        projection="split" if cross else draw(st.sampled_from(layouts)),
        score=draw(st.sampled_from(["sdpa", "softmax", "bmm"])),
        mask=mask,
        padding=draw(st.sampled_from(paddings)),
        relative=draw(rarely),
        bias=draw(st.booleans()),
        cross=cross,
        rotary=draw(rarely),
        normed=draw(rarely),
        dropout=draw(st.sampled_from([0.0, 0.1, 0.5])),
    )
    return dataclasses.replace(found, **fixed)


@st.composite
def plans(draw: st.DrawFn, layers: int) -> tuple[str, tuple[int, ...]]:
    """A plan for so many layers, in any of its forms, and the leader of every layer that it means."""
    form = draw(st.sampled_from(["uniform", "open", "sizes", "pattern", "leaders"]))
    if form == "leaders":
        leaders: list[int] = []
        for layer in range(layers):
            alone = [i for i, leader in enumerate(leaders) if i == leader]
            leaders.append(draw(st.sampled_from([*alone, layer])))
        return "leaders=" + ",".join(map(str, leaders)), tuple(leaders)
    if form in ("uniform", "open"):
        sizes = [n for n in range(1, layers + 1) if form == "open" or layers % n == 0]
        size = draw(st.sampled_from(sizes))
        sign = draw(st.sampled_from(["x", "by"]))
        text = f"{size}x*" if form == "open" else f"{size}{sign}{layers // size}"
        return text, tuple(i // size * size for i in range(layers))
    starts = [True] + [draw(st.booleans()) for _ in range(layers - 1)]
    heads = [i for i, start in enumerate(starts) if start]
    leaders = [max(head for head in heads if head <= i) for i in range(layers)]
    if form == "pattern" or len(heads) < 2:
        return "".join("F" if start else "S" for start in starts), tuple(leaders)
    ends = [*heads[1:], layers]
    return "+".join(str(end - head) for head, end in zip(heads, ends, strict=True)), tuple(leaders)
