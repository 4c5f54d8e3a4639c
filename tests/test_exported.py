"""A `torch.export.ExportedProgram` in place of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fxreuse
from fxreuse.frontend.inputs import Inputs

X = torch.randn(2, 5, 16)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, batch: dict[str, Tensor], shift: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.body(batch["x"] * scale + shift)


def call(x: Tensor) -> Inputs:
    return Inputs(({"x": x}, x), {"scale": 2.0})


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().eval()


@pytest.fixture(scope="module")
def exported(model: nn.Module) -> ExportedProgram:
    free = {0: Dim.AUTO, 1: Dim.AUTO}
    shapes = {"batch": {"x": free}, "shift": free, "scale": None}
    return torch.export.export(model, *call(X), dynamic_shapes=shapes, strict=False)


def test_its_own_example_serves(exported: ExportedProgram, model: nn.Module) -> None:
    assert [str(site) for site in fxreuse.find_attention(exported)] == [f"body.layers.{i}.self_attn" for i in range(2)]
    with pytest.warns(fxreuse.TrainingWarning, match="not in an exported program"):
        identity = fxreuse.apply(exported, "1x2")
    args, kwargs = call(torch.randn(3, 7, 16))
    torch.testing.assert_close(identity(*args, **kwargs), model(*args, **kwargs))


@pytest.mark.filterwarnings("ignore::fxreuse.TrainingWarning")
def test_verify_takes_the_model_that_it_was_exported_from(exported: ExportedProgram, model: nn.Module) -> None:
    shared = fxreuse.apply(exported, "2x1")
    assert fxreuse.verify(model, shared, call(X), compile=False, latency=False).passed
    with pytest.raises(fxreuse.InputError, match=r"original: .* an exported program; pass the model that"):
        fxreuse.verify(exported, shared)  # type: ignore[arg-type]
    with pytest.raises(fxreuse.InputError, match=r"describe: .* found an exported program"):
        fxreuse.describe(exported)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [call(X), {"batch": {"x": X}, "shift": X, "scale": 2.0}], ids=["call", "names"])
def test_an_example_of_the_same_structure_may_be_given(exported: ExportedProgram, given: Any) -> None:
    assert len(fxreuse.find_attention(exported, given)) == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (X, "found 1 positional, and by name none"),
        (({"y": X}, X), "the structure that it was exported with"),
        ({"batch": {"x": X}, "shift": X, "speed": 1}, "found 2 positional"),
        ([X], "expected a tensor, a tuple of positional arguments or a dict"),
        ({1: X}, "found dict"),
    ],
    ids=["tensor", "structure", "name", "list", "keys"],
)
def test_another_structure_is_refused(exported: ExportedProgram, given: Any, says: str) -> None:
    with pytest.raises(fxreuse.InputError) as caught:
        fxreuse.find_attention(exported, given)
    assert says in str(caught.value)
    assert "(batch, shift, scale)" in str(caught.value)


def test_without_any_example_one_is_asked_for(exported: ExportedProgram, tmp_path: Path) -> None:
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    loaded._example_inputs = None
    with pytest.raises(fxreuse.InputError, match=r"keeps no example inputs; pass example_inputs.*batch, shift, scale"):
        fxreuse.find_attention(loaded)
    assert len(fxreuse.find_attention(loaded, call(X))) == 2


@pytest.mark.parametrize("use", [fxreuse.find_attention, lambda model, **more: fxreuse.apply(model, "2x*", **more)])
def test_it_has_no_submodule_to_replace(exported: ExportedProgram, use: Any) -> None:
    with pytest.raises(fxreuse.UnsupportedError, match="target='body' needs the model itself"):
        use(exported, target="body")
