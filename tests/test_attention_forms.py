"""Whatever way an attention is written in, both lowerings compute its shared map."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxreuse
from fxreuse.checking.reference import MapSharing
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program
from fxreuse.passes.reuse import reuse
from fxreuse.program import Program, fixed_size

from .attention_forms import FORMS, WIDTH, Form, Layer, Model, heads, joined, product

FUSED = torch.ops.aten.scaled_dot_product_attention.default


def inputs(batch: int, tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    padding = torch.zeros(batch, tokens, dtype=torch.bool)
    padding[-1, -2:] = True
    return torch.randn(batch, tokens, 8, dtype=dtype), padding


def captured(model: torch.nn.Module) -> Program:
    """The program of a model in double precision, of which only the evaluation is looked at: one export is enough."""
    free = dict.fromkeys(range(2), torch.export.Dim.AUTO)
    return load_program(torch.export.export(model, inputs(3, 6), dynamic_shapes=(free, free), strict=False))


def lowered(model: Model, program: Program | None = None) -> dict[str, Program]:
    """The model with one map for all layers, in both lowerings."""
    program = program or captured(model)
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
        (output,) = program.graph.output_node().args[0]
        assert [fixed_size(size) for size in output.meta["val"].shape[:2]] == [None, None]  # no size was fixed
        (found,) = program.module(*given)
        visible = ~expected.isnan()
        torch.testing.assert_close(
            found[visible], expected[visible], rtol=1e-10, atol=1e-10, msg=lambda m, n=lowering: f"{n}: {m}"
        )
        for (path, _), own, other in zip(model.named_parameters(), gradients(model, found), wanted, strict=True):
            assert (own is None) == (other is None), (lowering, path)
            if own is not None and other is not None:
                torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operator makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def fused(width: int) -> Form:
    def attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        """Values of another width than keys, as in a follower that was widened."""
        value = torch.cat([heads(v), heads(v).sin()], -1)[..., :width]
        context = F.scaled_dot_product_attention(heads(q), heads(k), value, ~padding[:, None, None])
        return joined(F.pad(context, (0, max(0, WIDTH - width)))[..., :WIDTH])

    return attend


@pytest.mark.parametrize(
    "form", [fused(7), fused(3), FORMS["masked_with_infinity"], FORMS["causal_by_a_triangle"], FORMS["wide_values"]]
)
def test_no_map_is_held_where_no_bias_needs_it(form: Form) -> None:
    """As long as the mask is causal or has a row for all queries; leaders of unfused attentions included."""
    program = lowered(Model(form).double().eval())["recompute"]
    tokens = 512
    with torch.no_grad(), Largest() as largest:
        program.module(*inputs(1, tokens))
    assert 0 < largest.numel < tokens * tokens


def in_single_precision(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """A softmax in float32 whatever the model's type, with a bias in it."""
    scores = product(q, k).float().masked_fill(padding[:, None, None], -torch.inf)
    weights = (scores + layer.table[:, : q.shape[1]][:, None].float()).softmax(-1)
    return joined(weights.to(v.dtype) @ heads(v))


def test_casts_to_a_fixed_type_survive_a_change_of_type() -> None:
    """The fused operator wants one type of all its operands: that of the values, which the context has."""
    model = Model(in_single_precision).eval()
    program = lowered(model, load_program(model, inputs(3, 6, torch.float32)))
    given = inputs(2, 9, torch.bfloat16)
    found = {name: copy.deepcopy(part.module).bfloat16()(*given)[0] for name, part in program.items()}
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    torch.testing.assert_close(found["recompute"], found["materialize"], rtol=0.05, atol=0.05)


def talking_heads(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    mixing = torch.tensor([[0.7, 0.4], [-0.3, 0.8]], dtype=q.dtype)
    weights = torch.einsum("bhqk,gh->bgqk", product(q, k).softmax(-1), mixing)
    return joined(weights @ heads(v))


def suppressed(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    weights = product(q, k).softmax(-1)
    weights = torch.where(weights < weights.mean(-1, True) / 2, 0.0, weights)
    return joined((weights / weights.sum(-1, True)) @ heads(v))


def capped(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return joined((5 * torch.tanh(product(q, k) / 5)).masked_fill(padding[:, None, None], -1e9).softmax(-1) @ heads(v))


def times_a_matrix(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    place = torch.arange(q.shape[1], dtype=q.dtype)
    return joined((product(q, k) * (place[:, None] - place).cos()).softmax(-1) @ heads(v))


def faintly_masked(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return joined(product(q, k).masked_fill(padding[:, None, None], -3.0).softmax(-1) @ heads(v))


def zeroed_by_another_mask(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    weights = product(q, k).masked_fill(padding[:, None, None], -1e9).softmax(-1)
    return joined(weights.masked_fill(padding[:, None, :, None], 0.0) @ heads(v))


def kept_from_zero(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    powers = product(q, k).exp()
    return joined((powers / (powers.sum(-1, keepdim=True) + 1.0)) @ heads(v))


def weighted_exponentials(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    powers = product(q, k).exp() * (1.0 + torch.arange(q.shape[1]))
    return joined((powers / powers.sum(-1, keepdim=True)) @ heads(v))


REFUSED: dict[str, tuple[Form, str, str]] = {
    "kept from zero": (kept_from_zero, "", "rows that do not sum to 1"),
    "weighted exponentials": (weighted_exponentials, "", "which is no condition"),
    "talking heads": (talking_heads, "einsum", "all that is done to the map"),
    "suppressed": (suppressed, "", "map"),
    "capped": (capped, "tanh", "no factor, sum or mask"),
    "times a matrix": (times_a_matrix, "cos", "a matrix of their own shape"),
    "faintly masked": (faintly_masked, "masked_fill", "by -3.0, which does not rule them out"),
    "zeroed by another mask": (zeroed_by_another_mask, "", "but by the one mask of its scores"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recomputed_is_refused_and_can_be_stored(name: str) -> None:
    form, operator, reason = REFUSED[name]
    model = Model(form).double().eval()
    program = captured(model)
    sites = find(program)
    with pytest.raises(fxreuse.UnsupportedError) as caught:
        reuse(program, sites, [0, 0], "recompute")
    for word in ("layers.", operator, reason, "_forms.py:", "lowering=materialize"):
        assert word in str(caught.value)
    given = inputs(2, 9)
    (found,) = reuse(program, sites, [0, 0], "materialize").program.module(*given)
    torch.testing.assert_close(found, model.shared(*given), rtol=1e-10, atol=1e-10)


class WithMaps(Model):
    """Returns its maps, too."""

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        maps = []
        for layer in self.layers:
            q, k, v = layer.project(x)
            maps.append(product(q, k).softmax(-1))
            x = x + layer.o(joined(maps[-1] @ heads(v)))
        return x, maps


def test_maps_that_are_returned_are_those_of_the_leader() -> None:
    model = WithMaps(FORMS["two_consumers"]).double().eval()
    programs = lowered(model)
    assert (count(programs["materialize"]), count(programs["recompute"])) == (0, 2)
    given = inputs(2, 9)
    with MapSharing(model, {("", 1): ("", 0)}):
        expected, (first, second) = model(*given)
    assert torch.equal(first, second)
    for program in programs.values():
        for found, wanted in zip(program.module(*given), (expected, first, first), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
