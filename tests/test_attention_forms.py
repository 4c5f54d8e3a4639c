"""Whatever way an attention is written in, both lowerings compute its shared map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fxreuse
from fxreuse.find import find
from fxreuse.frontend import load_program
from fxreuse.passes.reuse import reuse
from fxreuse.program import Program

from .attention_forms import FORMS, Model

FUSED = torch.ops.aten.scaled_dot_product_attention.default


def inputs(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    padding = torch.zeros(batch, tokens, dtype=torch.bool)
    padding[-1, -2:] = True
    return torch.randn(batch, tokens, 8, dtype=torch.float64), padding


def lowered(model: Model) -> dict[str, Program]:
    """The model with one map for all layers, in both lowerings."""
    program = load_program(model, inputs(3, 6))
    sites = find(program)
    assert len(sites) == len(model.layers), sites
    leaders = [0] * len(sites)
    return {name: reuse(program, sites, leaders, name).program for name in ("materialize", "recompute")}


def count(program: Program) -> int:
    return sum(node.target is FUSED for node in program.graph.nodes)


def gradients(model: Model, output: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(output.square().sum(), list(model.parameters()), allow_unused=True))


@pytest.mark.parametrize("name", FORMS)
def test_both_lowerings_are_the_shared_map(name: str) -> None:
    model = Model(FORMS[name]).double().eval()
    programs = lowered(model)
    consumers = 2 if name == "two_consumers" else 1
    assert (count(programs["materialize"]), count(programs["recompute"])) == (0, 2 * consumers)
    given = inputs(2, 9)
    expected = model.shared(*given)
    wanted = gradients(model, expected)
    for lowering, program in programs.items():
        (found,) = program.module(*given)
        visible = ~expected.isnan()
        torch.testing.assert_close(found[visible], expected[visible], rtol=1e-10, atol=1e-10, msg=lambda m, n=lowering: f"{n}: {m}")
        for (path, _), own, other in zip(model.named_parameters(), gradients(model, found), wanted, strict=True):
            assert (own is None) == (other is None), (lowering, path)
            if own is not None and other is not None:
                torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)
