"""The functions that shared weights and residuals are computed with: what they mean; they change no operand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from fxreuse.cost_model.device import Device
from fxreuse.cost_model.macs import macs_of
from fxreuse.cost_model.residual_time import ResidualMatrix
from fxreuse.residual_linear import merged_weight, residual_linear

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@st.composite
def cases(draw: st.DrawFn):
    """An input, a weight with or without bias, and residuals of one or several parts of it."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    inputs = draw(st.integers(1, 6))
    counts = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    x = torch.randn(*draw(st.lists(st.integers(0, 6), max_size=2)), inputs, dtype=torch.float64)
    if draw(st.booleans()) and x.dim() == 3:
        x = x.transpose(0, 1)
    weight = torch.randn(sum(counts), inputs, dtype=torch.float64)
    bias = torch.randn(sum(counts), dtype=torch.float64) if draw(st.booleans()) else None
    residuals = []
    for count in counts:
        rank = draw(st.integers(1, 3))
        a, b = torch.randn(inputs, rank, dtype=torch.float64), torch.randn(rank, count, dtype=torch.float64)
        d = torch.randn(min(inputs, count), dtype=torch.float64) if draw(st.booleans()) else None
        residuals.append((a, b, d))
    return x, weight, bias, residuals


def dense(weight, residuals):
    """U + A B + D, one element at a time for D."""
    whole, start = weight.t().clone(), 0
    for a, b, d in residuals:
        whole[:, start : start + b.shape[1]] += a @ b
        for i in range(0 if d is None else len(d)):
            whole[i, start + i] += d[i]
        start += b.shape[1]
    return whole


@given(cases())
def test_both_forms_are_the_product_with_the_dense_matrix(case):
    x, weight, bias, residuals = case
    before = [tensor.clone() for tensor in tensors(case)]
    expected = x @ dense(weight, residuals) + (0 if bias is None else bias)
    torch.testing.assert_close(residual_linear(x, weight, bias, residuals), expected, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(residual_linear(x, weight, bias, residuals), expected, **EXACT)
    assert all(map(torch.equal, tensors(case), before))


def tensors(case):
    x, weight, bias, residuals = case
    found = [x, weight, bias, *(tensor for residual in residuals for tensor in residual)]
    return [tensor for tensor in found if tensor is not None]


@given(cases())
def test_a_merged_weight_is_the_dense_matrix(case):
    _, weight, _, residuals = case
    a, b, d = residuals[0]
    own = weight[: b.shape[1]]
    before = own.clone()
    for made in (merged_weight(own, b.t(), a.t(), d), torch.no_grad()(merged_weight)(own, b.t(), a.t(), d)):
        torch.testing.assert_close(made.t(), dense(own, residuals[:1]), **EXACT)
    assert torch.equal(own, before)


def example(*, grad=False):
    torch.manual_seed(0)
    made = torch.randn(2, 3, 4), torch.randn(6, 4), torch.randn(6), torch.randn(4, 2), torch.randn(2, 6), torch.randn(4)
    return tuple(tensor.double().requires_grad_(grad) for tensor in made)


def run(x, weight, bias, a, b, d):
    return residual_linear(x, weight, bias, [(a, b, d)])


def test_gradients():
    assert torch.autograd.gradcheck(run, example(grad=True))
    assert torch.autograd.gradcheck(lambda w, a, b, d: merged_weight(w, b.t(), a.t(), d), [
        tensor for place, tensor in enumerate(example(grad=True)) if place in (1, 3, 4, 5)
    ])  # fmt: skip


@torch.no_grad()
def test_transforms_and_autocast_without_gradients():
    """In-place sums would not do for a batch of weights, for tangents, or for products in another type."""
    given = example()
    expected = run(*given)
    scaled = [tensor * (1 + (place in (1, 3, 5))) for place, tensor in enumerate(given)]
    batch = (torch.stack(pair) for pair in zip(given, scaled, strict=True))
    mapped = torch.vmap(run, in_dims=(None, 0, None, 0, None, 0))(
        *(both if place in (1, 3, 5) else both[0] for place, both in enumerate(batch))
    )
    torch.testing.assert_close(mapped, torch.stack([expected, run(*scaled)]), **EXACT)
    value, tangent = torch.func.jvp(lambda d: run(*given[:-1], d), (given[-1],), (torch.ones_like(given[-1]),))
    torch.testing.assert_close(value, expected, **EXACT)
    torch.testing.assert_close(tangent[..., :4], given[0], **EXACT)
    single = [tensor.float() for tensor in given]
    with torch.autocast("cpu", torch.bfloat16):
        narrow = run(*single)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.double(), expected, rtol=0.05, atol=0.1)


def test_a_traced_graph_has_separate_operators():
    """What is compiled or exported shows what it computes, with and without gradients."""
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode:
            exported = torch.export.export(Wrapped(), example()).graph
            assert not any("_." in str(node.target) for node in exported.nodes if node.op == "call_function")
            compiled = torch.compile(run, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(*example()), run(*example()), **EXACT)


class Wrapped(torch.nn.Module):
    def forward(self, *given):
        return run(*given)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_multiply_accumulates(shape):
    inputs, outputs = shape
    graph = fx.Graph()

    def node(*sizes):
        made = graph.placeholder("x")
        made.meta["val"] = torch.empty(sizes, device="meta")
        return made

    x, weight, a, b = node(2, 3, inputs), node(outputs, inputs), node(inputs, 2), node(2, outputs)
    product = graph.call_function(residual_linear, (x, weight, None, [(a, b, None)]))
    product.meta["val"] = torch.empty(2, 3, outputs, device="meta")
    assert macs_of(product) == 6 * (inputs * outputs + 2 * (inputs + outputs))
    merged = graph.call_function(merged_weight, (weight, transposed(graph, b), transposed(graph, a), None))
    merged.meta["val"] = weight.meta["val"]
    assert macs_of(merged) == 2 * inputs * outputs


def transposed(graph, node):
    made = graph.call_function(torch.ops.aten.t.default, (node,))
    made.meta["val"] = node.meta["val"].t()
    return made


@pytest.mark.parametrize("device", [Device.preset("A100"), Device.typical_cpu()])
def test_few_tokens_are_factored_and_many_merged(device):
    """The factored form grows with the tokens, the merged one does not."""
    times = [ResidualMatrix(tokens, 2048, 2048, 16) for tokens in (1, 64, 512, 4096, 32768)]
    factored = [one.factored(device) for one in times]
    assert factored == sorted(factored)
    assert len({one.merged(device) for one in times}) == 1
    assert times[0].factored(device) < times[0].merged(device)
    assert times[-1].factored(device) > times[-1].merged(device)
    assert ResidualMatrix(512, 512, 512, 16, diagonal=False).factored(device) < times[2].factored(device)
