"""Attentions of the wild, by hand: forms of packages that are not installed everywhere, and forms that few have.

Each class is one layer that maps hidden states to hidden states, ``(batch, tokens, 16)``, with four heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS = 16, 4
HEAD = WIDTH // HEADS


class Stack(nn.Module):
    """Layers in sequence with residual connections; whatever else is given goes to every layer."""

    def __init__(self, layer: Callable[..., nn.Module], layers: int = 3, after: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers))
        self.after = after

    def forward(self, x: torch.Tensor, *given: Any) -> torch.Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x), *given)
        return x if self.after is None else self.after(x)


def split(x: torch.Tensor, heads: int = HEADS) -> torch.Tensor:
    """``(batch, tokens, heads·channels)`` to ``(batch, heads, tokens, channels)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `split`."""
    return x.transpose(1, 2).flatten(2)


class Separate(nn.Module):
    """Projections of their own for queries, keys and values; subclasses say what happens in between."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return split(self.q(x)), split(self.k(x)), split(self.v(x))

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        q, k, _ = self.qkv(x)
        return q @ k.mT / math.sqrt(HEAD)

    def probs(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(x).softmax(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(merge(self.probs(x) @ self.qkv(x)[2]))


class TimmViT(nn.Module):
    """timm's Vision Transformer: one projection, ``reshape(B, N, 3, H, D)``, ``unbind``, norms of queries and keys."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(HEAD), nn.LayerNorm(HEAD)
        self.attn_drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, count, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            x = self.attn_drop((q * HEAD**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, count, width))


class Interleaved(nn.Module):
    """GPT-NeoX's fused projection: queries, keys and values of a head stand together."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], HEADS, 3 * HEAD).transpose(1, 2).chunk(3, dim=-1)
        return self.out(merge(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class Thirds(nn.Module):
    """One projection cut by ``split``; heads batched with the batch, products by ``bmm`` and ``baddbmm``."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, count, _ = x.shape
        q, k, v = (split(part).reshape(-1, count, HEAD) for part in self.qkv(x).split(WIDTH, -1))
        zeros = x.new_zeros(1, 1, 1)
        probs = torch.baddbmm(zeros, q, k.transpose(1, 2), beta=0.0, alpha=HEAD**-0.5).softmax(-1)
        return self.out(merge(torch.bmm(probs, v).view(batch, HEADS, count, HEAD)))


class Einsum(nn.Module):
    """Weights with a head axis, contracted by ``einsum``; tokens stay before heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(WIDTH, HEADS, HEAD)) for _ in range(3))
        self.out = nn.Parameter(torch.randn(HEADS, HEAD, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.einsum("btd,dhc->bthc", x, weight) for weight in (self.q, self.k, self.v))
        probs = torch.einsum("bqhc,bkhc->bhqk", q * HEAD**-0.5, k).softmax(-1)
        return torch.einsum("bhqk,bkhc,hcd->bqd", probs, v, self.out)


class EinsumFused(nn.Module):
    """One einops-style projection to ``(qkv, batch, heads, tokens, channels)``; the map has its heads last."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3, HEADS, WIDTH, HEAD))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = torch.einsum("btd,nhdc->nbhtc", x, self.qkv)
        probs = torch.einsum("bhqc,bhkc->bqkh", q, k).div(math.sqrt(HEAD)).softmax(2)
        return self.out(torch.einsum("bqkh,bhkc->bqhc", probs, v).flatten(2))


class MultiQuery(nn.Module):
    """One head of keys and values for all heads of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * HEAD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k, v = self.kv(x).chunk(2, -1)
        probs = (split(self.q(x)) @ k[:, None].mT * HEAD**-0.5).softmax(-1)
        return self.out(merge(probs @ v[:, None]))


class Grouped(nn.Module):
    """Two heads of keys and values, each for two heads of queries, by a reshape of the queries and no repetition."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, 2 * HEAD), nn.Linear(WIDTH, 2 * HEAD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = split(self.q(x)).unflatten(1, (2, 2))
        k, v = split(self.k(x), 2)[:, :, None], split(self.v(x), 2)[:, :, None]
        probs = (q @ k.mT / HEAD**0.5).softmax(-1)
        return self.out(merge((probs @ v).flatten(1, 2)))


class ValueWidth(nn.Module):
    """Values wider than queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, HEADS * 2), nn.Linear(WIDTH, HEADS * 2)
        self.v, self.out = nn.Linear(WIDTH, HEADS * 6), nn.Linear(HEADS * 6, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        return self.out(merge(F.scaled_dot_product_attention(q, k, v)))


def rotate(x: torch.Tensor, paired: bool) -> torch.Tensor:
    """Rotary positions, of neighbouring channels or of the two halves."""
    half = x.shape[-1] // 2
    rates = 10.0 ** -(torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angles = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)[:, None] * rates
    a, b = (x[..., ::2], x[..., 1::2]) if paired else x.chunk(2, -1)
    turned = a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()
    return torch.stack(turned, -1).flatten(-2) if paired else torch.cat(turned, -1)


class Rotary(Separate):
    """Rotary positions, in the form that ``paired`` says."""

    def __init__(self, paired: bool) -> None:
        super().__init__()
        self.paired = paired

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        q, k, _ = self.qkv(x)
        return rotate(q, self.paired) @ rotate(k, self.paired).mT / math.sqrt(HEAD)


class Alibi(Separate):
    """A penalty on distance, by head, and a causal mask of minus infinity."""

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        slopes = 2.0 ** -torch.arange(1, HEADS + 1, device=x.device, dtype=x.dtype)
        distance = (at[None, :] - at[:, None]).to(x.dtype)
        future = torch.full(distance.shape, -math.inf, device=x.device, dtype=x.dtype).triu(1)
        return super().scores(x) + slopes[:, None, None] * distance + future


class SlidingWindow(Separate):
    """Only keys at most two positions away."""

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        return super().scores(x).masked_fill((at[:, None] - at[None, :]).abs() > 2, torch.finfo(x.dtype).min)


class Chunked(Separate):
    """Streaming: chunks of three frames see themselves, one chunk back, and one frame ahead."""

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        start = at // 3 * 3
        seen = (at[None, :] >= (start - 3)[:, None]) & (at[None, :] < (start + 4)[:, None])
        return super().scores(x).masked_fill(~seen, -math.inf)


class RelativeShift(Separate):
    """Transformer-XL's relative positions: a second product, shifted so that diagonals become columns."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Linear(WIDTH, WIDTH, bias=False)
        self.u, self.w = nn.Parameter(torch.zeros(HEADS, 1, HEAD)), nn.Parameter(torch.zeros(HEADS, 1, HEAD))

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        q, k, _ = self.qkv(x)
        count = x.shape[1]
        distance = torch.arange(count - 1, -count, -1, device=x.device, dtype=x.dtype)
        rates = torch.arange(1, WIDTH // 2 + 1, device=x.device, dtype=x.dtype)
        angles = distance[:, None] / rates
        position = split(self.position(torch.cat([angles.sin(), angles.cos()], -1)[None]))
        by_position = (q + self.w) @ position.mT
        padded = F.pad(by_position, (1, 0)).flatten(2)[:, :, count:].unflatten(2, (count, 2 * count - 1))
        return ((q + self.u) @ k.mT + padded[..., :count]) / math.sqrt(HEAD)


class TalkingHeads(Separate):
    """Heads are mixed before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.Linear(HEADS, HEADS, bias=False), nn.Linear(HEADS, HEADS, bias=False)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        return self.before(super().scores(x).movedim(1, -1)).movedim(-1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probs = self.behind(self.probs(x).movedim(1, -1)).movedim(-1, 1)
        return self.out(merge(probs @ self.qkv(x)[2]))


class Sinks(Separate):
    """A learned score by head that takes probability and gives no value."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.zeros(HEADS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x)
        scores = q @ k.mT / math.sqrt(HEAD)
        sinks = self.sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        probs = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        return self.out(merge(probs @ v))


class OffByOne(Separate):
    """A softmax that can attend to nothing: a zero key and a zero value in front."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x)
        return self.out(merge(F.scaled_dot_product_attention(q, F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0)))))


class Suppressed(Separate):
    """Weak attention suppression: probabilities below a threshold of each row go, the rest is normalised again."""

    def probs(self, x: torch.Tensor) -> torch.Tensor:
        probs = super().probs(x)
        threshold = probs.mean(-1, keepdim=True) - 0.5 * probs.std(-1, keepdim=True)
        kept = probs * (probs >= threshold)
        return kept / kept.sum(-1, keepdim=True)


class HeadMask(Separate):
    """A learned weight for every head, on its map; the softmax in float32; dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.dropout = nn.Parameter(torch.ones(HEADS, 1, 1)), nn.Dropout(0.1)

    def probs(self, x: torch.Tensor) -> torch.Tensor:
        probs = F.softmax(self.scores(x), -1, dtype=torch.float32).type_as(x)
        return self.dropout(probs) * self.weight


class SoftCap(Separate):
    """Scores are kept within a range by a hyperbolic tangent."""

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        return 5.0 * torch.tanh(super().scores(x) / 5.0)


class Cosine(Separate):
    """Normalised queries and keys, and a learned temperature by head."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.zeros(HEADS, 1, 1))

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        q, k, _ = self.qkv(x)
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature.clamp(max=4.0).exp()


class WrittenOut(Separate):
    """A softmax written as exponentials over their sum."""

    def probs(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.scores(x)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        return weights / weights.sum(-1, keepdim=True)


class Flex(Separate):
    """FlexAttention with a penalty on distance."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        def penalty(score: Any, _batch: Any, _head: Any, query: Any, key: Any) -> Any:
            return score - (query - key).abs()

        return self.out(merge(flex_attention(*self.qkv(x), score_mod=penalty)))


class KeyFirst(Separate):
    """Keys times queries, normalised over the first axis; values times the map."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x)
        probs = (k @ q.mT / math.sqrt(HEAD)).softmax(-2)
        return self.out(merge((v.mT @ probs).mT))


class TwoConsumers(Separate):
    """Zipformer: one map serves two attentions over values, and a gated one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.gate = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probs = self.probs(x)
        x = x + merge(probs @ split(self.first(x)))
        x = x + self.gate(x).sigmoid() * merge(probs @ split(torch.tanh(self.second(x))))
        return self.out(merge(probs @ split(self.v(x))))


class Conformer(nn.Module):
    """torchaudio's Conformer layer: ``MultiheadAttention`` with a mask from lengths, convolution, two half steps."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn1, self.ffn2 = (
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.SiLU(), nn.Linear(32, WIDTH)) for _ in range(2)
        )
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1)
        self.conv_norm, self.pointwise = nn.LayerNorm(WIDTH), nn.Conv1d(WIDTH, 2 * WIDTH, 1)
        self.depthwise, self.batch_norm = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
        x = x + 0.5 * self.ffn1(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, key_padding_mask=padded, need_weights=False)[0]
        y = F.glu(self.pointwise(self.conv_norm(x).permute(1, 2, 0)), dim=1)
        x = x + F.silu(self.batch_norm(self.depthwise(y))).permute(2, 0, 1)
        return x + 0.5 * self.ffn2(x)


class ConformerEncoder(nn.Module):
    """torchaudio's Conformer: hidden states and lengths in, hidden states out."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.conformer_layers = nn.ModuleList(Conformer() for _ in range(layers))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        padded = torch.arange(x.shape[1], device=x.device)[None, :] >= lengths[:, None]
        x = x.transpose(0, 1)
        for layer in self.conformer_layers:
            x = layer(x, padded)
        return x.transpose(0, 1)


class Axial(nn.Module):
    """Attention along the rows of a picture, then along its columns."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = Separate(), Separate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.rows(x.flatten(0, 1)).view_as(x)
        return x + self.columns(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class Pictures(nn.Module):
    """Layers over ``(batch, height, width, channels)``."""

    def __init__(self, layer: Callable[[], nn.Module], layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Window(Separate):
    """Swin: attention within windows of 2×2, with a bias by relative position, after a shift."""

    def __init__(self, shift: int, side: int) -> None:
        super().__init__()
        self.shift = shift
        self.bias = nn.Parameter(torch.zeros(HEADS, 4, 4))
        region = torch.zeros(side, side)
        if shift:
            region[-2:, :-1], region[:-1, -2:], region[-1:, :], region[:, -1:] = 1, 2, 3, 4
            region[-1:, -1:] = 5
        windows = region.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).transpose(1, 2).reshape(-1, 4)
        apart = windows[:, None, :] != windows[:, :, None]
        self.register_buffer("mask", apart.float() * -100.0 if shift else None)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        scores = super().scores(x) + self.bias
        if self.mask is None:
            return scores
        count = self.mask.shape[0]
        return (scores.view(-1, count, *scores.shape[1:]) + self.mask[:, None]).view_as(scores)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, channels = x.shape
        y = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        y = y.view(batch, height // 2, 2, width // 2, 2, channels).transpose(2, 3).reshape(-1, 4, channels)
        y = super().forward(y)
        y = y.view(batch, height // 2, width // 2, 2, 2, channels).transpose(2, 3).reshape(x.shape)
        return x + torch.roll(y, (self.shift, self.shift), (1, 2))


class Swin(nn.Module):
    """Two stages of four layers, every other one shifted; between them four tokens are merged into one."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList(Window(i % 2, side) for i in range(4)) for side in (8, 4))
        self.merging = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.stages[0]:
            x = layer(x)
        x = self.merging(torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1))
        for layer in self.stages[1]:
            x = layer(x)
        return x


class Reused(nn.Module):
    """ALBERT: one layer, called several times."""

    def __init__(self, layer: nn.Module, calls: int = 4) -> None:
        super().__init__()
        self.layer, self.norm, self.calls = layer, nn.LayerNorm(WIDTH), calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.calls):
            x = x + self.layer(self.norm(x))
        return x


class Unrolled(nn.Module):
    """Layers with names of their own, and no container."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Separate(), Separate(), Separate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x)
        x = x + self.second(x)
        return x + self.third(x)


class Decoder(nn.Module):
    """Causal self-attention, then attention on a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = Interleaved(), Separate()

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        x = x + self.own(x)
        q, k, v = split(self.other.q(x)), split(self.other.k(memory)), split(self.other.v(memory))
        return self.other.out(merge((q @ k.mT / HEAD**0.5).softmax(-1) @ v))


class AttentivePooling(nn.Module):
    """A weight for each token, and their weighted mean; then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.head = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((self.score(x).softmax(1).mT @ x).squeeze(1)).softmax(-1)


class ProbePooling(nn.Module):
    """SigLIP's head: a learned query asks all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(self.probe.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0].squeeze(1)


class Router(nn.Module):
    """A mixture of three experts, weighted by a softmax over them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.gate(x).softmax(-1)
        return torch.einsum("bte,bted->btd", weights, torch.stack([expert(x) for expert in self.experts], 2))


class GatedConvolution(nn.Module):
    """A convolution whose kernel is a softmax of the input: dynamic, and no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        windows = F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1)
        return (windows @ self.kernel(x).softmax(-1)[..., None]).squeeze(-1)
