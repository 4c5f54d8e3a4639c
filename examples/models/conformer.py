"""Conformer-M as two studies of attention-map reuse use it (ICLR 2022, and the study of its latency that followed).

16 layers, d = 256, 4 heads, feed-forward width 4d, depthwise kernel 31; a linear layer to 128 word pieces and the
blank of CTC. The convolutional subsampling in front is left out, as in the papers' parameter counts and timings: the
input is a sequence of frames of width d, one per 40 ms.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Sequential):
    """LN → d×f → Swish → f×d, to be added with half a step."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, 4 * dim),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(4 * dim, dim),
            nn.Dropout(dropout),
        )


class RelativeAttention(nn.Module):
    """Self-attention with relative positions: scores = ((q + u)·k + shift((q + v)·p)) / √d_h (Transformer-XL)."""

    def __init__(self, dim: int, heads: int, dropout: float, gamma: float | None) -> None:
        super().__init__()
        self.heads, self.gamma = heads, gamma
        self.norm = nn.LayerNorm(dim)
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))
        self.position = nn.Linear(dim, dim, bias=False)
        self.u = nn.Parameter(torch.empty(heads, dim // heads))
        self.v = nn.Parameter(torch.empty(heads, dim // heads))
        nn.init.xavier_uniform_(self.u)
        nn.init.xavier_uniform_(self.v)
        self.map_dropout, self.dropout = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor, distances: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = (self.split(projection(x)) for projection in (self.query, self.key, self.value))
        p = self.split(self.position(distances))
        content = (q + self.u[:, None]) @ k.transpose(-1, -2)
        position = shift((q + self.v[:, None]) @ p.transpose(-1, -2))
        attention_map = torch.softmax((content + position) / math.sqrt(q.shape[-1]), -1)
        if self.gamma is not None:
            attention_map = suppress_weak(attention_map, self.gamma)
        context = self.map_dropout(attention_map) @ v
        return self.dropout(self.output(context.transpose(1, 2).flatten(2)))

    def split(self, x: Tensor) -> Tensor:
        """(batch, frames, d) → (batch, heads, frames, d_h)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def shift(scores: Tensor) -> Tensor:
    """From a column per distance, T−1 down to −(T−1), to a column per key: (…, T, 2T−1) → (…, T, T)."""
    *batch, frames, distances = scores.shape
    padded = F.pad(scores, (1, 0)).reshape(*batch, distances + 1, frames)
    return padded[..., 1:, :].reshape(*batch, frames, distances)[..., :frames]


def suppress_weak(attention_map: Tensor, gamma: float) -> Tensor:
    """Weak attention suppression: what lies below mean − γ·std of its row becomes 0, and the row sums to 1 again."""
    threshold = attention_map.mean(-1, keepdim=True) - gamma * attention_map.std(-1, keepdim=True)
    kept = attention_map.masked_fill(attention_map < threshold, 0.0)
    return kept / kept.sum(-1, keepdim=True)


class Convolution(nn.Module):
    """LN → pointwise to 2d → GLU → depthwise → BN → Swish → pointwise."""

    def __init__(self, dim: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.pointwise1 = nn.Conv1d(dim, 2 * dim, 1)
        self.depthwise = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)
        self.batch_norm = nn.BatchNorm1d(dim, momentum=0.005)
        self.pointwise2 = nn.Conv1d(dim, dim, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.pointwise1(self.norm(x).transpose(1, 2)), dim=1)
        x = F.silu(self.batch_norm(self.depthwise(x)))
        return self.dropout(self.pointwise2(x).transpose(1, 2))


class ConformerLayer(nn.Module):
    """½FF → self-attention → convolution → ½FF → LN, each with a residual."""

    def __init__(self, dim: int, heads: int, kernel: int, dropout: float, gamma: float | None) -> None:
        super().__init__()
        self.feed_forward1 = FeedForward(dim, dropout)
        self.attention = RelativeAttention(dim, heads, dropout, gamma)
        self.convolution = Convolution(dim, kernel, dropout)
        self.feed_forward2 = FeedForward(dim, dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, distances: Tensor) -> Tensor:
        x = x + 0.5 * self.feed_forward1(x)
        x = x + self.attention(x, distances)
        x = x + self.convolution(x)
        x = x + 0.5 * self.feed_forward2(x)
        return self.norm(x)


class Conformer(nn.Module):
    """Frames (batch, T, d) → logits (batch, T, vocabulary). The defaults are Conformer-M.

    ``gamma`` turns weak attention suppression on; the ICLR paper trains with 0.5.
    """

    def __init__(
        self,
        dim: int = 256,
        layers: int = 16,
        heads: int = 4,
        kernel: int = 31,
        vocabulary: int = 129,
        dropout: float = 0.1,
        gamma: float | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConformerLayer(dim, heads, kernel, dropout, gamma) for _ in range(layers))
        self.head = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        distances = sinusoids(frames)
        for layer in self.layers:
            frames = layer(frames, distances)
        return self.head(frames)


def sinusoids(frames: Tensor) -> Tensor:
    """The encoding of every distance between two frames, from T−1 down to −(T−1): (1, 2T−1, d)."""
    length, dim = frames.shape[1:]
    distances = torch.arange(length - 1, -length, -1, device=frames.device, dtype=frames.dtype)
    rates = torch.exp(torch.arange(0, dim, 2, device=frames.device, dtype=frames.dtype) * (-math.log(10000.0) / dim))
    angles = distances[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[None]
