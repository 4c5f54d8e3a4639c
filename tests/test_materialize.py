"""The stored map: one call of `attention_map` for a group, another dtype on request, common work done once."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxreuse
from fxreuse.errors import UnsupportedError
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program
from fxreuse.map_workspace import attention_map
from fxreuse.nodes import remove_dead
from fxreuse.passes.materialize import Materializer
from fxreuse.passes.merge_readers import merge_readers
from fxreuse.program import Program

from .architectures import randomise
from .test_lowerings import (
    Attend,
    Layer,
    Model,
    additive,
    additive_with_holes,
    capped,
    divided,
    fused,
    inputs,
    padding,
    reference,
    two_biases,
    unfused,
)

aten = torch.ops.aten


def batched(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
    """Heads in the batch; bias and product in one operator, both with a factor."""
    batch, heads, tokens, _ = q.shape
    bias = mask.expand(batch, heads, tokens, tokens).flatten(0, 1)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), beta=0.5, alpha=0.3)
    return torch.bmm(torch.softmax(scores, -1), v.flatten(0, 1)).view(batch, heads, tokens, -1)


def suppressed(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
    """What every layer does to its map after the softmax is the same, and cheap to see in the graph."""
    weights = torch.softmax(q @ k.transpose(-1, -2), -1)
    weights = weights.masked_fill(weights < weights.mean(-1, keepdim=True), 0.0)
    return layer.dropout(weights / weights.sum(-1, keepdim=True)) @ v


ATTENTIONS: dict[str, tuple[Attend, Any]] = {
    "fused": (fused(), None),
    "causal": (fused(is_causal=True), None),
    "padding": (fused(), padding),
    "additive, empty rows": (fused(), additive_with_holes),
    "unfused": (unfused(divided), None),
    "unfused, two biases": (unfused(two_biases), additive),
    "unfused, baddbmm": (batched, additive),
    "soft cap": (unfused(capped), None),
}


@functools.cache
def captured(name: str, dropout: float = 0.0) -> tuple[Model, Program, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    attend, mask = ATTENTIONS[name]
    given = inputs(mask)
    model = randomise(Model(attend, dropout=dropout, layers=3)).double()
    return model, load_program(model, given), given


def share(program: Program, dtype: torch.dtype | None = None) -> Program:
    """All layers use the first one's map."""
    program = program.copy()
    sites = list(find(program))
    Materializer(program, dtype).share(sites[0], sites[1:])
    remove_dead(program.graph)
    program.module.recompile()
    program.check()
    return program


def calls(program: Program, target: Any) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is target]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_leaders_map_is_one_call(name: str) -> None:
    model, program, given = captured(name)
    shared = share(program)
    plain = 1 if name == "soft cap" else 0  # not affine in the product: the model's own softmax stays
    assert len(calls(shared, attention_map)) == 1 - plain
    assert len(calls(shared, aten.softmax.int)) == plain
    expected = reference(model, *given, leaders=(0, 0, 0))
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded):
            torch.testing.assert_close(shared.module(*given)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_map_in_bfloat16(name: str) -> None:
    """The products are computed in it as well; what comes out has the model's dtype, and is near."""
    model, program, given = captured(name)
    shared = share(program, torch.bfloat16)
    products = [*calls(shared, aten.matmul.default), *calls(shared, aten.bmm.default)]
    assert [node.meta["val"].dtype for node in products].count(torch.bfloat16) == 3
    with torch.no_grad():
        expected = reference(model, *given, leaders=(0, 0, 0))
        found = shared.module(*given)[0]
    assert found.dtype == torch.float64
    error = float((found - expected).norm() / (expected - given[0]).norm())
    assert 1e-5 < error < 2**-7
    shared.module(*given)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.layers[2].v.parameters())
    model.zero_grad()


def test_a_map_in_another_dtype_goes_through_dropout() -> None:
    for name in ("fused", "unfused"):
        shared = share(captured(name, 0.5)[1], torch.bfloat16)
        drops = [node for node in shared.graph.nodes if node.op == "call_module" and node.users]
        assert len(drops) == 3
        assert {node.meta["val"].dtype for node in drops} == {torch.bfloat16}


def test_what_all_do_to_the_map_is_done_once() -> None:
    model = randomise(Model(suppressed, layers=3)).double()
    program = load_program(model, inputs(None))
    shared = share(program)
    for target in (aten.masked_fill.Scalar, aten.mean.dim, aten.div.Tensor):
        assert (len(calls(program, target)), len(calls(shared, target))) == (3, 1)
    given = inputs(None)
    torch.testing.assert_close(
        shared.module(*given)[0], reference(model, *given, leaders=(0, 0, 0)), rtol=1e-12, atol=1e-12
    )


def values_first(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
    weights = torch.softmax(q @ k.transpose(-1, -2), -1)
    return (v.transpose(-1, -2) @ weights.transpose(-1, -2)).transpose(-1, -2)


def test_a_map_that_does_not_go_straight_into_a_product_has_no_other_dtype() -> None:
    program = load_program(Model(values_first, layers=2), inputs(None))
    with pytest.raises(UnsupportedError, match=r"layers\.0: dtype=.*matmul_1.*Leave dtype= out"):
        share(program, torch.bfloat16)


class Readers(nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        changed = torch.sin(x)
        changed[0] = 1.0
        return [
            torch.cos(x),
            torch.cos(x),
            torch.rand_like(x),
            torch.rand_like(x),
            torch.sin(x),
            changed,
            x.exp(),
            x.log(),
        ]


def test_only_equal_pure_readers_are_merged() -> None:
    program = load_program(Readers(), torch.rand(3, 4))
    before = len(program.graph.nodes)
    source = program.graph.find_nodes(op="placeholder")[0]
    assert merge_readers(source) == 1
    remove_dead(program.graph)
    assert len(program.graph.nodes) == before - 1
    assert len(calls(program, aten.cos.default)) == 1
    assert len(calls(program, aten.sin.default)) == 2


class CastToQueries(torch.nn.Module):
    """A soft-capped attention whose map is computed in float32 and cast back to the dtype of its queries."""

    def __init__(self, capped: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(8, 8) for _ in range(3))
        self.capped = capped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2)
        scores = torch.tanh(scores) if self.capped else scores
        attention_map = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        return x + (attention_map @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("lowering", ["materialize", "recompute"])
def test_a_cast_to_the_dtype_of_queries_keeps_no_queries_alive(lowering: str) -> None:
    model = torch.nn.Sequential(*(CastToQueries(capped=lowering == "materialize") for _ in range(3))).eval()
    small = fxreuse.apply(model, f"3x1 lowering={lowering}", torch.randn(2, 5, 8))
    names = {name for name, _ in small.named_parameters()}
    assert {name for name in names if not name.startswith("0.")} == {
        f"{i}.v.{n}" for i in (1, 2) for n in ("weight", "bias")
    }
    half = small.to(torch.bfloat16)
    assert half(torch.randn(2, 5, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def gated(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
    """The context is weighed by the queries, too."""
    return F.scaled_dot_product_attention(q, k, v) * torch.sigmoid(q)


@pytest.mark.parametrize("lowering", ["materialize", "recompute"])
def test_names_queries_that_something_else_reads(lowering: str) -> None:
    model = Model(gated).eval()
    record = fxreuse.describe(fxreuse.apply(model, f"2x2 lowering={lowering}", inputs(None)[0].float()))
    assert [(note.where, note.text) for note in record.notes if note.kind == "cost"] == [
        (f"layers.{i}", f"its queries are still computed: read by aten.sigmoid.default in layers.{i}") for i in (1, 3)
    ]
    assert set(record.removed) == {f"layers.{i}.k.{n}" for i in (1, 3) for n in ("weight", "bias")}
