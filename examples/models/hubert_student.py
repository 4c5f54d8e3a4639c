"""The students of Recycle-and-Distill: HuBERT's shape, thinner, every layer projected to the teacher's width.

The paper's models are two and what plans make of them. `HubertStudent(432, 816)` is the one of its table of reuse
patterns; under ``2by6`` it is ARMHuBERT-S, the rows called "-up" are ``6by2 ffn=match:2by6`` and ``3by4
ffn=match:2by6``. `HubertStudent(480, 640)` is MaskHuBERT; under ``2by6 ffn=864`` it is ARMHuBERT.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrontEnd(nn.Module):
    """Waveform → frames of width d, one per 20 ms: nine convolutions without bias (channels, kernel, stride)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        sizes = [(128, 10, 5), (256, 1, 1), *[(256, 3, 2)] * 4, (dim, 1, 1), *[(dim, 2, 2)] * 2]
        inputs = [1, *(channels for channels, _, _ in sizes)]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, channels, kernel, stride, bias=False)
            for before, (channels, kernel, stride) in zip(inputs, sizes, strict=False)
        )
        self.group_norm = nn.GroupNorm(128, 128)

    def forward(self, waveform: Tensor) -> Tensor:
        first, *others = self.convolutions
        x = F.gelu(self.group_norm(first(waveform[:, None])))
        for convolution in others:
            x = F.gelu(convolution(x))
        return x.transpose(1, 2)


class PositionalConvolution(nn.Module):
    """Relative position from a grouped convolution of even width whose weight is normalised per tap."""

    def __init__(self, dim: int, kernel: int = 128, groups: int = 16) -> None:
        super().__init__()
        convolution = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups)
        self.convolution = nn.utils.parametrizations.weight_norm(convolution, dim=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.convolution(x.transpose(1, 2))[..., :-1]).transpose(1, 2)


class Layer(nn.Module):
    """Self-attention, then a feed-forward layer; the norms come after the residuals, as in BERT."""

    def __init__(self, dim: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout_p = heads, dropout
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))
        self.attention_norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, width), nn.Linear(width, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(projection(x)) for projection in (self.query, self.key, self.value))
        context = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout_p if self.training else 0.0)
        x = self.attention_norm(x + self.dropout(self.output(context.transpose(1, 2).flatten(2))))
        return self.norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))

    def split(self, x: Tensor) -> Tensor:
        """(batch, frames, d) → (batch, heads, frames, d_h)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class HubertStudent(nn.Module):
    """Waveform at 16 kHz (batch, samples) → every layer's output at the teacher's width, (batch, T, 768) each.

    ``masked`` (batch, T) marks the frames that the mask embedding stands in for during distillation.
    """

    def __init__(
        self,
        dim: int = 432,
        width: int = 816,
        layers: int = 12,
        heads: int = 12,
        teacher: int = 768,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.front_end = FrontEnd(dim)
        self.feature_norm = nn.LayerNorm(dim)
        self.mask_embedding = nn.Parameter(torch.rand(dim))
        self.positions = PositionalConvolution(dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(dim, width, heads, dropout) for _ in range(layers))
        self.projections = nn.ModuleList(nn.Linear(dim, teacher) for _ in range(layers))

    def forward(self, waveform: Tensor, masked: Tensor) -> list[Tensor]:
        x = self.feature_norm(self.front_end(waveform))
        x = torch.where(masked[..., None], self.mask_embedding, x)
        x = self.dropout(self.norm(x + self.positions(x)))
        outputs = []
        for layer, projection in zip(self.layers, self.projections, strict=True):
            x = layer(x)
            outputs.append(projection(x))
        return outputs


def frames(samples: int) -> int:
    """The number of frames that the front end makes of so many samples."""
    for kernel, stride in ((10, 5), *[(3, 2)] * 4, *[(2, 2)] * 2):
        samples = (samples - kernel) // stride + 1
    return samples
