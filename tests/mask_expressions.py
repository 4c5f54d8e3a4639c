"""Masks as data: small expressions of positions, built from anything a model might write, and run by torch."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import fx

Expression = tuple[Any, ...]

LOWEST = torch.finfo(torch.float32).min

POSITIONS: dict[str, Callable[[int], torch.Tensor]] = {
    "plain": lambda size: torch.arange(size),
    "from one": lambda size: torch.arange(1, size + 1) - 1,
    "backwards": lambda size: torch.arange(size).flip(0),
    "from the end": lambda size: size - 1 - torch.arange(size),
    "even": lambda size: torch.arange(0, 2 * size, 2),
    "strided": lambda size: torch.arange(3 * size)[1::3],
    "tail": lambda size: torch.arange(size + 3)[3:],
    "tail from the end": lambda size: torch.arange(size + 3)[-size:],
    "gathered": lambda size: torch.arange(size + 1)[torch.arange(size) + 1],
    "gathered from the end": lambda size: torch.arange(size)[torch.arange(size) - size],
    "counted": lambda size: torch.ones(size, dtype=torch.long).cumsum(0) - 1,
    "slope": lambda size: torch.diff(torch.arange(size), prepend=torch.full((1,), -1)),
}

COMPARE = {name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}
JOIN = {"and": torch.logical_and, "or": operator.or_, "band": operator.and_, "xor": operator.xor}

FINISH: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bool": lambda visible: visible,
    "heads": lambda visible: visible[None, None].expand(2, 1, -1, -1),
    "heads split": lambda visible: visible.expand(6, -1, -1).reshape(2, 3, *visible.shape),
    "heads joined": lambda visible: visible.expand(2, 3, -1, -1).reshape(6, *visible.shape),
    "swapped twice": lambda visible: visible.transpose(0, 1).reshape(1, visible.shape[1], -1)[0].mT,
    "where": lambda visible: torch.where(visible, 0.0, -torch.inf),
    "where zeros": lambda visible: torch.where(visible, torch.zeros(()), LOWEST),
    "masked_fill": lambda visible: torch.zeros(visible.shape).masked_fill(~visible, LOWEST),
    "inverted": lambda visible: (1.0 - visible.float()) * LOWEST,
    "full times": lambda visible: torch.full(visible.shape, LOWEST) * (~visible).float(),
}

integers = st.sampled_from((-1, 0, 0, 0, 1, 2, 3, 8, 128, 4096))
small = st.sampled_from((-2, -1, 0, 0, 1, 2))

_query = st.tuples(st.just("position"), st.just(0), st.just("plain") | st.sampled_from(sorted(POSITIONS)))
_key = st.tuples(st.just("position"), st.just(1), st.just("plain") | st.sampled_from(sorted(POSITIONS)))
_forms = st.recursive(
    _query | _key,
    lambda forms: st.one_of(
        st.tuples(st.just("plus"), forms, integers),
        st.tuples(st.just("times"), forms, small),
        st.tuples(st.just("minus"), forms, forms),
        st.tuples(st.just("plus size"), forms, st.sampled_from((-1, 1)), st.sampled_from((0, 1))),
        st.tuples(st.just("abs"), forms),
    ),
    max_leaves=3,
)
_comparisons = st.one_of(
    st.tuples(st.just("compare"), st.sampled_from(sorted(COMPARE)), _key, _query),
    st.tuples(st.just("compare"), st.sampled_from(sorted(COMPARE)), _forms, _forms),
    st.tuples(st.just("compare number"), st.sampled_from(sorted(COMPARE)), _forms, integers),
    st.tuples(st.just("compare"), st.just("le"), st.just(("position", 1, "plain")), st.just(("position", 0, "plain"))),
    st.tuples(st.just("triangle"), st.sampled_from(("tril", "triu")), small),
    st.tuples(st.just("constant"), st.booleans()),
)
formulas = st.recursive(
    _comparisons,
    lambda inner: st.one_of(
        st.tuples(st.just("join"), st.sampled_from(sorted(JOIN)), inner, inner),
        st.tuples(st.just("not"), inner),
        st.tuples(st.just("where"), inner, inner, inner),
        st.tuples(st.just("as integers"), inner, small),
        st.tuples(st.just("window of"), inner, integers),
    ),
    max_leaves=4,
)
masks = st.tuples(st.sampled_from(sorted(FINISH)), formulas)


def number(expression: Expression, sizes: tuple[int, int]) -> torch.Tensor:
    """An expression of positions, as integers that broadcast to (queries, keys)."""
    kind, *rest = expression
    if kind == "position":
        dim, name = rest
        return POSITIONS[name](sizes[dim]).unsqueeze(1 - dim)
    form = number(rest[0], sizes)
    if kind == "plus":
        return form + rest[1]
    if kind == "times":
        return rest[1] * form
    if kind == "minus":
        return form - number(rest[1], sizes)
    if kind == "plus size":
        return form + rest[1] * sizes[rest[2]]
    assert kind == "abs"
    return form.abs()


def visible(expression: Expression, sizes: tuple[int, int]) -> torch.Tensor:
    """A formula, as bools of shape (queries, keys)."""
    kind, *rest = expression
    if kind == "compare":
        found = COMPARE[rest[0]](number(rest[1], sizes), number(rest[2], sizes))
    elif kind == "compare number":
        found = COMPARE[rest[0]](number(rest[1], sizes), rest[2])
    elif kind == "triangle":
        found = getattr(torch.ones(sizes, dtype=torch.bool), rest[0])(rest[1])
    elif kind == "constant":
        found = torch.full((), rest[0])
    elif kind == "join":
        found = JOIN[rest[0]](visible(rest[1], sizes), visible(rest[2], sizes))
    elif kind == "not":
        found = ~visible(rest[0], sizes)
    elif kind == "where":
        found = torch.where(*(visible(part, sizes) for part in rest))
    elif kind == "as integers":
        found = visible(rest[0], sizes).long() > rest[1]
    else:
        assert kind == "window of"
        distance = torch.arange(sizes[0])[:, None] - torch.arange(sizes[1])
        found = visible(rest[0], sizes) & (distance < rest[1])
    return found.expand(sizes)


def mask(expression: Expression, sizes: tuple[int, int]) -> torch.Tensor:
    """A mask as a model would give it to attention."""
    finish, formula = expression
    return FINISH[finish](visible(formula, sizes))


def constants(expression: Expression) -> Iterator[int]:
    """The integers that an expression mentions."""
    for part in expression:
        if isinstance(part, tuple):
            yield from constants(part)
        elif isinstance(part, int) and not isinstance(part, bool):
            yield part


class Masks(torch.nn.Module):
    """A model that does nothing but make masks, of the sizes of its inputs."""

    def __init__(self, expressions: list[Expression], square: bool) -> None:
        super().__init__()
        self.expressions = expressions
        self.square = square

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> list[torch.Tensor]:
        sizes = (queries.shape[0], queries.shape[0] if self.square else keys.shape[0])
        return [mask(expression, sizes) for expression in self.expressions]


def outputs(model: torch.nn.Module, *inputs: torch.Tensor, dynamic: bool = True) -> list[fx.Node]:
    """The nodes of a model's outputs, after an export in which all sizes are free."""
    free = tuple(dict.fromkeys(range(value.ndim), torch.export.Dim.AUTO) for value in inputs) if dynamic else None
    program = torch.export.export(model, inputs, dynamic_shapes=free, strict=False)
    (found,) = program.graph.output_node().args
    return list(found)


def sizes_to_try(expressions: list[Expression], square: bool) -> Iterator[tuple[int, int]]:
    """Sizes on both sides of every integer that is mentioned, and all small ones."""
    mentioned = sorted({abs(c) + extra for e in expressions for c in constants(e) for extra in (0, 1, 2)} - {0})
    few = range(1, 7)
    if square:
        yield from ((size, size) for size in sorted({*few, *(size for size in mentioned if size < 200)}))
    else:
        yield from itertools.product(few, few)
        for size in mentioned:
            yield from ((size, 2), (2, size))
