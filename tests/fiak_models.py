"""Small models whose scores something can be added to from outside, as an independent reference for priors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTH, DIM, HEADS = 12, 16, 2


class Attention(nn.Module):
    """Self-attention; ``extra``, where it is set, is added to its scores. Subclasses write it in their own way."""

    causal = False

    def __init__(self) -> None:
        super().__init__()
        self.extra: Tensor | None = None
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))

    def mask(self, x: Tensor) -> Tensor | None:
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.extra is None:
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)
        length = q.shape[-2]
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + self.extra[..., :length, :length]
        if self.causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return torch.softmax(scores, -1) @ v

    def forward(self, x: Tensor) -> Tensor:
        context = self.attend(*self.operands(x), self.mask(x))
        return self.o(context.transpose(1, 2).flatten(2))


class Causal(Attention):
    causal = True


class FusedProjection(Attention):
    """Queries, keys and values side by side in one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        del self.q, self.k, self.v

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.split(q), self.split(k), self.split(v)


class PerHeadProjection(FusedProjection):
    """Queries, keys and values of one head side by side, then those of the next; no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).view(*x.shape[:2], HEADS, 3, -1).unbind(3)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class Rotary(FusedProjection):
    """Rotary positions, the channels of keys and queries turned by where they stand."""

    causal = True

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().operands(x)
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] / 100 ** (torch.arange(4, dtype=x.dtype) / 4)
        cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()

        def turn(y: Tensor) -> Tensor:
            return y * cos + torch.cat((-y[..., 4:], y[..., :4]), -1) * sin

        return turn(q), turn(k), v


class Grouped(Attention):
    """One head of keys and values for all of queries, and norms of both."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(DIM, DIM // HEADS), nn.Linear(DIM, DIM // HEADS)
        self.norm = nn.LayerNorm(DIM // HEADS)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().operands(x)
        return self.norm(q), self.norm(k).expand(-1, HEADS, -1, -1), v.expand(-1, HEADS, -1, -1)


class LowRank(Attention):
    """Keys from a product of two thin matrices, beside a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(DIM, 3, bias=False), nn.Linear(3, DIM, bias=False)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(self.q(x)), self.split(self.k(x) + self.up(self.down(x))), self.split(self.v(x))


class Normalised(Attention):
    """Queries and keys of length one."""

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().operands(x)
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v


class Pointwise(Attention):
    """Projections that are convolutions over one position, channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv1d(DIM, DIM, 1) for _ in range(3))

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (projection(x.transpose(1, 2)).transpose(1, 2) for projection in (self.q, self.k, self.v))
        return self.split(q), self.split(k), self.split(v)


class Biased(Attention):
    """A learned bias for every head, query and key, added to the scores of a fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))

    def mask(self, x: Tensor) -> Tensor:
        return self.bias.unsqueeze(0)


class Unfused(Biased):
    """The same with a softmax of its own, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
        scores = scores if self.extra is None else scores + self.extra
        return self.dropout(torch.softmax(scores, -1)) @ v


class BatchedHeads(Attention):
    """Heads in the batch, and scores of products of three dimensions."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (y.flatten(0, 1) for y in (q, k, v))
        scores = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(q.shape[-1])
        if self.extra is not None:
            scores = (scores.unflatten(0, (-1, HEADS)) + self.extra).flatten(0, 1)
        return torch.bmm(torch.softmax(scores, -1), v).unflatten(0, (-1, HEADS))


class LengthsLeftOut(Attention):
    """Heads in the batch and back, in views that leave a length to be found; causal."""

    causal = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, width = q.shape
        q, k, v = (y.reshape(batch * heads, -1, width) for y in (q, k, v))
        scores = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, length, -1) / math.sqrt(width)
        if self.extra is not None:
            scores = scores + self.extra[..., :length, :length]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = scores + torch.zeros(length, length, dtype=q.dtype).masked_fill(hidden, -math.inf)
        probs = torch.softmax(scores, -1).view(batch * heads, length, -1)
        return torch.bmm(probs, v).view(batch, heads, length, width)


class Typed(Attention):
    """Norms and a softmax in a type of their own, and back to that of the keys and of the scores; causal."""

    causal = True

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().operands(x)
        wide = k.double()
        return q, (wide * wide.square().mean(-1, keepdim=True).add(1e-6).rsqrt()).type_as(k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if self.extra is not None:
            scores = scores + self.extra[..., : q.shape[-2], : k.shape[-2]]
        hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
        return torch.softmax(scores, -1, dtype=torch.float64).type_as(scores) @ v


class Windowed(Attention):
    """Every query sees the three keys before it, and itself."""

    def mask(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        behind = place[:, None] - place[None, :]
        return (behind >= 0) & (behind < 4)


class Layers(nn.Module):
    """Layers of one kind of attention, each with a feed-forward layer: (batch, length, 16) → the same."""

    def __init__(self, kind: Callable[[], Attention], layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList((kind(), nn.Linear(DIM, DIM), nn.LayerNorm(DIM))) for _ in range(layers)
        )

    @property
    def attentions(self) -> list[Attention]:
        return [layer[0] for layer in self.layers]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        for attention, feed_forward, norm in self.layers:  # type: ignore[misc]
            x = x + attention(norm(x))
            x = x + feed_forward(x).tanh()
        return x


KINDS = (
    Attention, Causal, FusedProjection, PerHeadProjection, Rotary, Grouped, LowRank, Normalised, Pointwise, Biased,
    Unfused, BatchedHeads, LengthsLeftOut, Typed, Windowed,
)  # fmt: skip


def build(kind: Callable[[], Attention], layers: int = 2) -> tuple[Layers, Tensor]:
    """A model in double precision, and inputs that it takes."""
    torch.manual_seed(1)
    return Layers(kind, layers).double().eval(), torch.randn(3, LENGTH, DIM).double()
