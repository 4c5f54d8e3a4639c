"""The encoder of the streaming Transformer-Transducer that ResidualTransformer compresses.

18 layers, d = 512, 8 heads, feed-forward width 2048, over log-mel frames that two convolutions downsample by four. It
streams: a frame (40 ms) sees its own chunk of 160 ms to the end, which makes the look-ahead, and 288 ms of history. The
masks are the same in every layer, so a longer look-ahead would add up over the layers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RelativeAttention(nn.Module):
    """Self-attention with an embedding of the distance between query and key: scores = q·(k + r)/√d_h."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))
        self.map_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, distances: Tensor, embeddings: Tensor, visible: Tensor) -> Tensor:
        q, k, v = (self.split(projection(x)) for projection in (self.query, self.key, self.value))
        by_distance = q @ embeddings.T
        by_key = by_distance.gather(-1, distances.expand(*by_distance.shape[:2], -1, -1))
        scores = (q @ k.transpose(-1, -2) + by_key) / math.sqrt(q.shape[-1])
        attention_map = torch.softmax(scores.masked_fill(~visible, -math.inf), -1)
        return self.output((self.map_dropout(attention_map) @ v).transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        """(batch, frames, d) → (batch, heads, frames, d_h)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    """Self-attention and a feed-forward layer, each behind its norm."""

    def __init__(self, dim: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = RelativeAttention(dim, heads, dropout)
        self.fc1, self.fc2 = nn.Linear(dim, width), nn.Linear(width, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, distances: Tensor, embeddings: Tensor, visible: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), distances, embeddings, visible))
        return x + self.dropout(self.fc2(F.relu(self.fc1(self.norm(x)))))


class TransducerEncoder(nn.Module):
    """Log-mel frames of 10 ms (batch, frames, mels) → (batch, ⌈⌈frames/2⌉/2⌉, d).

    ``chunk``, ``look_back`` and ``look_ahead`` count frames of 40 ms, the last beyond the chunk's own end. Seven whole
    frames lie within 288 ms.
    """

    def __init__(
        self,
        dim: int = 512,
        width: int = 2048,
        layers: int = 18,
        heads: int = 8,
        mels: int = 80,
        channels: int = 32,
        chunk: int = 4,
        look_back: int = 7,
        look_ahead: int = 0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.chunk, self.look_back, self.look_ahead = chunk, look_back, look_ahead
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, channels, 3, 2, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 2, padding=1),
            nn.ReLU(),
        )
        self.input = nn.Linear(channels * ((mels + 3) // 4), dim)
        reach = chunk - 1 + max(look_back, look_ahead)  # the longest distance that the masks let through
        self.reach = reach
        self.distance_embeddings = nn.Parameter(torch.randn(2 * reach + 1, dim // heads) / math.sqrt(dim // heads))
        self.layers = nn.ModuleList(Layer(dim, width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        x = self.convolutions(features[:, None])
        x = self.input(x.transpose(1, 2).flatten(2))
        frame = torch.arange(x.shape[1], device=x.device)
        distances = (frame - frame[:, None]).clamp(-self.reach, self.reach) + self.reach
        visible = chunk_mask(frame, self.chunk, self.look_back, self.look_ahead)
        for layer in self.layers:
            x = layer(x, distances, self.distance_embeddings, visible)
        return self.norm(x)


def chunk_mask(frame: Tensor, chunk: int, look_back: int, look_ahead: int) -> Tensor:
    """Which frames (columns) each frame (rows) sees: its own chunk, and so many frames before and after it."""
    start = (frame // chunk * chunk)[:, None]
    return (frame >= start - look_back) & (frame < start + chunk + look_ahead)
