"""Convolutions over one position take part in sharing where a plan asks for it: a Conformer."""

from __future__ import annotations

import functools

import pytest
import torch
from models.conformer import Conformer

import fxreuse
from fxreuse.frontend.load import load_program

from .running import assert_same
from .shared_weights import applied, gradients, meaning, size

EXACT = 1e-12
WIDTH, LAYERS = 12, 2
#: Inputs and outputs of the pointwise convolutions of a layer.
POINTWISE = [(WIDTH, 2 * WIDTH), (WIDTH, WIDTH)]


@functools.cache
def captured():
    torch.manual_seed(0)
    model = Conformer(WIDTH, LAYERS, heads=2, kernel=3, vocabulary=5).double().eval()
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    return model, load_program(model, x), {"frames": x}


@pytest.mark.parametrize(
    "plan",
    [
        "share k=2 convolutions=yes",
        "share k=2 bias=own init=mean convolutions=yes",
        "residual k=2 r=2 convolutions=yes lowering=factored",
        "residual k=2 r=2 convolutions=yes lowering=merged",
        "2x1 | residual k=2 r=2 convolutions=yes",
    ],
)
def test_they_are_the_projections_that_they_are(plan):
    """Sizes, values, gradients, and the check, against the original with the weights U + A B + D."""
    model, program, inputs = captured()
    small = applied(model, program, plan, inputs)
    record = fxreuse.describe(small)
    shared = {one.shared for one in record.matrices if "pointwise" in one.weight}
    assert len(shared) == len(POINTWISE)
    assert all(small.get_parameter(path).dim() == 3 for path in shared)
    assert not any("depthwise" in one.weight for one in record.matrices)
    assert size(small) == size(model) - record.parameters_removed + record.parameters_added
    reuse = plan.startswith("2x1")
    if not reuse:
        twin = meaning(model, small)
        assert_same(small(**inputs), twin(**inputs), EXACT)
        with torch.no_grad():
            assert_same(small(**inputs), twin(**inputs), EXACT)
        dense = gradients(twin, lambda: twin(**inputs).square().sum())
        found = gradients(small, lambda: small(**inputs).square().sum())
        for path in shared:
            total = sum(dense[path.replace("layers.0", f"layers.{layer}")] for layer in range(LAYERS))
            torch.testing.assert_close(found[path], total, rtol=1e-9, atol=1e-9)
    if reuse or "merged" in plan:
        assert fxreuse.verify(model, small, inputs, compile=False, latency=False).passed


def test_sizes_with_and_without_them():
    model, program, inputs = captured()
    found = {
        option: size(applied(model, program, f"residual k=2 r=2 init=zero{option}", inputs))
        for option in ("", " convolutions=yes")
    }
    weights = sum(inputs * outputs + outputs for inputs, outputs in POINTWISE)
    residuals = sum(2 * (inputs + outputs) + min(inputs, outputs) for inputs, outputs in POINTWISE)
    assert found[""] - found[" convolutions=yes"] == (LAYERS - 1) * weights - LAYERS * residuals


def test_full_rank_is_exact():
    model, program, inputs = captured()
    small = applied(model, program, f"residual k=2 r={WIDTH} bias=own convolutions=yes", inputs)
    assert_same(small(**inputs), model(**inputs), 1e-10)


def test_residuals_go_to_weights_that_are_shared():
    model, program, inputs = captured()
    small = applied(model, program, "share k=2 convolutions=yes | residual r=2 convolutions=yes", inputs)
    assert sum("pointwise" in one.weight for one in fxreuse.describe(small).matrices if one.residual) == 2 * LAYERS
    assert_same(small(**inputs), applied(model, program, "share k=2 convolutions=yes", inputs)(**inputs), EXACT)
    with pytest.raises(fxreuse.PlanError, match=r"write convolutions=yes in the share pass, too"):
        applied(model, program, "share k=2 | residual r=2 convolutions=yes", inputs)
