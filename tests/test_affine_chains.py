"""Scores made of random factors, biases, masks and views, in any order: both lowerings are the shared map."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxreuse.finding.find import find
from fxreuse.passes.reuse import reuse

from .attention_forms import HEADS, LOWEST, Form, Layer, Model, heads, joined
from .test_attention_forms import captured, inputs

Bias = Callable[[Layer, Tensor, Tensor], Tensor]


def distance(layer: Layer, q: Tensor, padding: Tensor) -> Tensor:
    place = torch.arange(q.shape[1], dtype=q.dtype)
    return (place[:, None] - place).abs() / -5


ADDED: dict[str, Bias] = {
    "distance": distance,
    "table": lambda layer, q, padding: layer.table[:, : q.shape[1]][:, None],
    "rows": lambda layer, q, padding: q.mean(-1)[:, None, :, None],
    "weak padding": lambda layer, q, padding: -2.0 * padding[:, None, None].to(q.dtype),
    "strong padding": lambda layer, q, padding: -1e4 * padding[:, None, None].to(q.dtype),
}
HIDDEN: dict[str, Bias] = {
    "padding": lambda layer, q, padding: padding[:, None, None],
    "both": lambda layer, q, padding: padding[:, None, :, None] | padding[:, None, None],
    "future": lambda layer, q, padding: torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1),
    "far": lambda layer, q, padding: distance(layer, q, padding) < -0.5,
}
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("times"), st.sampled_from((0.5, 2, math.pi))),
        st.tuples(st.just("over"), st.sampled_from((0.5, 2, math.pi))),
        st.tuples(st.just("plus"), st.sampled_from((*ADDED, 1.5))),
        st.tuples(st.just("minus"), st.sampled_from(tuple(ADDED))),
        st.tuples(st.just("masked_fill"), st.sampled_from(tuple(HIDDEN))),
        st.tuples(st.just("where"), st.sampled_from(tuple(HIDDEN))),
        st.tuples(st.sampled_from(("join heads", "split heads", "swap")), st.just(None)),
    ),
    min_size=2,
    max_size=7,
)


def chain(steps: list[tuple[str, str | float | None]], fill: float) -> Form:
    """An attention whose scores go through these steps, in whatever layout they are by then."""

    def attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        batch, tokens, _ = q.shape
        scores, swapped = heads(q) @ heads(k).mT / 4, False

        def laid_out(tensor: Tensor) -> Tensor:
            tensor = tensor.mT if swapped else tensor
            return tensor.expand(batch, HEADS, tokens, tokens).flatten(0, 1) if scores.ndim == 3 else tensor

        masked = False
        for step, value in steps:
            if masked and fill == -1e9 and step in ("plus", "minus"):
                continue  # what is added to such a number is no bias
            if masked and fill != -torch.inf and step in ("times", "over"):
                continue  # there would be two such numbers, and the larger one would be seen where all is hidden
            masked |= step in ("masked_fill", "where")
            if step == "times":
                scores = value * scores
            elif step == "over":
                scores = scores / value
            elif step == "plus":
                scores = scores + (laid_out(ADDED[value](layer, q, padding)) if value in ADDED else value)
            elif step == "minus":
                scores = scores - laid_out(ADDED[value](layer, q, padding))
            elif step == "masked_fill":
                scores = scores.masked_fill(laid_out(HIDDEN[value](layer, q, padding)), fill)
            elif step == "where":
                scores = torch.where(laid_out(~HIDDEN[value](layer, q, padding)), scores, fill)
            elif step == "swap":
                scores, swapped = scores.mT, not swapped
            elif scores.ndim == 4 and step == "join heads":
                scores = scores.flatten(0, 1)
            elif scores.ndim == 3 and step == "split heads":
                scores = scores.unflatten(0, (-1, HEADS))
        weights = scores.softmax(-2).mT if swapped else scores.softmax(-1)
        if weights.ndim == 3:
            return joined((weights @ heads(v).flatten(0, 1)).unflatten(0, (-1, HEADS)))
        return joined(weights @ heads(v))

    return attend


class Side(nn.Module):
    """Several attentions side by side, so that one capture serves them all."""

    def __init__(self, forms: list[Form]) -> None:
        super().__init__()
        self.models = nn.ModuleDict({f"form{i}": Model(form) for i, form in enumerate(forms)})

    def forward(self, x: Tensor, padding: Tensor) -> list[Tensor]:
        return [model(x, padding) for model in self.models.values()]


@settings(max_examples=3)
@given(st.lists(st.tuples(STEPS, st.sampled_from((-torch.inf, LOWEST, -1e9))), min_size=5, max_size=5))
def test_both_lowerings_are_the_shared_map(chains: list[tuple[list[tuple[str, str | float | None]], float]]) -> None:
    model = Side([chain(steps, fill) for steps, fill in chains]).double().eval()
    whole = captured(model)
    given_inputs = inputs(2, 9)
    expected = [part.shared(*given_inputs) for part in model.models.values()]
    for lowering in ("materialize", "recompute"):
        program = whole
        for sites in find(whole).stacks.values():
            program = reuse(program, sites, [0, 0], lowering).program
        for found, wanted, steps in zip(program.module(*given_inputs), expected, chains, strict=True):
            seen = ~wanted.isnan()  # where a query saw no key at all, the model gives NaN
            assert torch.allclose(found[seen], wanted[seen], rtol=1e-10, atol=1e-10), (lowering, steps)
