"""What is known of a tensor's elements, as values to compute with: functions of the few that one may take.

>>> from fxreuse.masks.index_forms import Affine, Number, at_most_zero, negation
>>> first = at_most_zero(Affine.index(0, 1))
>>> mask = cases([(first, Number(0.0)), (negation(first), Number(-1.0))])
>>> print(satisfied(lambda leaf: Truth(leaf.value < 0), mask))
-i0 + 1 <= 0
>>> combine(lambda leaf: Number(0 * leaf.value), mask) == always(Number(0.0))  # equal values need no condition
True
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

from .index_forms import (
    Affine,
    Cases,
    Formula,
    Leaf,
    Truth,
    Unknown,
    Value,
    conjunction,
    disjunction,
    substitute_form,
    substitute_formula,
)

#: A tensor that takes more different values than this is given up.
CASES_LIMIT = 4


def cases(parts: Iterable[tuple[Formula, Leaf]]) -> Cases | Unknown:
    """The value that is ``leaf`` where its condition holds, equal leaves merged."""
    merged: dict[Leaf, Formula] = {}
    for condition, leaf in parts:
        if condition != Truth(False):
            merged[leaf] = disjunction(merged[leaf], condition) if leaf in merged else condition
    if not merged or len(merged) > CASES_LIMIT:
        return Unknown("a tensor of too many different values")
    if len(merged) == 1:
        return Cases(tuple((Truth(True), leaf) for leaf in merged))
    return Cases(tuple((condition, leaf) for leaf, condition in merged.items()))


def always(leaf: Leaf) -> Cases:
    """The value that is ``leaf`` at every index."""
    return Cases(((Truth(True), leaf),))


def combine(function: Callable[..., Leaf | Unknown], *values: Cases) -> Cases | Unknown:
    """The values that a function of several values takes, with the conditions for each."""
    parts = []
    for choice in itertools.product(*(value.parts for value in values)):
        condition = conjunction(*(condition for condition, _ in choice))
        leaf = function(*(leaf for _, leaf in choice))
        if isinstance(leaf, Unknown):
            return leaf
        parts.append((condition, leaf))
    return cases(parts)


def satisfied(predicate: Callable[..., Formula], *values: Cases) -> Formula:
    """The formula of a predicate of several values."""
    return disjunction(
        *(
            conjunction(*(condition for condition, _ in choice), predicate(*(leaf for _, leaf in choice)))
            for choice in itertools.product(*(value.parts for value in values))
        )
    )


def substitute(value: Value, rows: Sequence[Affine | None], ndim: int) -> Value:
    """What is known after a change of index, which `index_forms.substitute_formula` explains."""
    if isinstance(value, Cases):
        parts = []
        for condition, leaf in value.parts:
            moved = substitute_form(leaf, rows, ndim) if isinstance(leaf, Affine) else leaf
            if isinstance(moved, Unknown):
                return moved
            parts.append((substitute_formula(condition, rows, ndim), moved))
        return cases(parts)
    return substitute_formula(value, rows, ndim)
