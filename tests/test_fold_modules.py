"""Folding operators back into modules: only where the module does nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxreuse


class Convolved(nn.Module):
    """A convolution in front of an encoder."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.convolution(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect"])
def test_a_convolution_is_padded_once(padding_mode: str) -> None:
    model = Convolved(nn.Conv1d(8, 8, 3, padding=1, padding_mode=padding_mode)).double().eval()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    same = fxreuse.apply(model, "1x2", x)
    torch.testing.assert_close(same(x), model(x), rtol=0, atol=1e-12)
    assert isinstance(same.convolution, nn.Conv1d) == (padding_mode == "zeros")


def test_a_patched_forward_runs_once() -> None:
    model = Convolved(nn.Conv1d(8, 8, 3, padding=1)).double().eval()
    plain = model.convolution.forward
    model.convolution.forward = lambda x: plain(2 * x)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    same = fxreuse.apply(model, "1x2", x)
    torch.testing.assert_close(same(x), model(x), rtol=0, atol=1e-12)


def test_folded_modules_are_found_by_their_class_and_share_parameters() -> None:
    model = Convolved(nn.Conv1d(8, 8, 1)).eval()
    same = fxreuse.apply(model, "1x2", torch.randn(2, 7, 8))
    linear = same.get_submodule("encoder.layers.1.linear1")
    assert type(linear) is nn.Linear
    assert linear is not model.encoder.layers[1].linear1
    assert linear.weight is model.encoder.layers[1].linear1.weight
