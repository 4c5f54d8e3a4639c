"""Sizes that a graph reads out of a tensor, where that tensor was itself made of sizes.

Some models keep a length in a tensor of one element and slice with it (``torch.tensor(min(T, 512))``). A capture gives
what they slice a symbol of its own, as it would for data. Here such symbols are found out: integer tensors of one
element are followed as expressions, up to where they become bounds of a slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import Max, Min
from torch.utils._sympy.symbol import SymT, symbol_is_type
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from .sizes import elements, expression, operands, operator_name, shape
from .walk import Step, Value

# Operators on integers that sizes go through, by name; the operands as in the schema.
_ARITHMETIC: Mapping[str, Callable[..., sympy.Expr]] = {
    "add": lambda one, other, alpha=1: one + alpha * other,
    "sub": lambda one, other, alpha=1: one - alpha * other,
    "rsub": lambda one, other, alpha=1: alpha * other - one,
    "mul": lambda one, other: one * other,
    "neg": lambda one: -one,
    "minimum": lambda one, other: Min(one, other),
    "maximum": lambda one, other: Max(one, other),
}
_SAME = frozenset({
    "scalar_tensor", "lift_fresh", "lift_fresh_copy", "alias", "detach", "clone", "contiguous", "to", "_to_copy",
    "reshape", "view", "squeeze", "item", "_local_scalar_dense",
})  # fmt: skip


def data_sizes(steps: Iterable[Step]) -> dict[sympy.Symbol, sympy.Expr]:
    """What the symbols stand for that a capture has for sizes out of tensors, as far as those were made of sizes.

    Arguments:
        steps: what a program executes.

    >>> from fxreuse.cost_model.walk import walk
    >>> from fxreuse.frontend.load import load_program
    >>> class Window(torch.nn.Module):
    ...     def forward(self, x):
    ...         span = torch.tensor(min(x.shape[1], 4))
    ...         return x[:, :span] * 2
    >>> spans = data_sizes(walk(load_program(Window(), torch.ones(2, 9)).module)).values()
    >>> [[int(span.subs(dict.fromkeys(span.free_symbols, length))) for length in (3, 9)] for span in spans]
    [[3, 4], [3, 4]]
    """
    known: dict[int, sympy.Expr] = {}
    found: dict[sympy.Symbol, sympy.Expr] = {}
    for step in steps:
        value, result = step.values[step.node], step.node.meta.get("val")
        if isinstance(value, Value) and (number := _number(step, known)) is not None:
            known[value.number] = number.xreplace(found)
            if isinstance(result, torch.SymInt) and _from_data(result.node.expr):
                found[result.node.expr] = known[value.number]
        if operator_name(step.node) == "aten.slice" and isinstance(result, torch.Tensor):
            _sliced(step, known, found)
    return found


def _from_data(size: sympy.Expr) -> bool:
    """Whether a size is one symbol, for data: torch calls those u0, u1 …"""
    return size.is_Symbol and symbol_is_type(size, SymT.UNBACKED_INT)


def _number(step: Step, known: Mapping[int, sympy.Expr]) -> sympy.Expr | None:
    """The value of a node that is an integer, or an integer tensor of one element, if sizes make it."""
    node, result = step.node, step.node.meta.get("val")
    if node.op == "get_attr":
        held = next(iter(step.tensors.values()), None)
        return None if held is None else _held(held)
    if isinstance(result, torch.SymInt) and not _from_data(result.node.expr):
        return result.node.expr
    if isinstance(result, torch.Tensor) and (elements(node) != 1 or result.is_floating_point()):
        return None
    library, _, name = operator_name(node).partition(".")
    if library != "aten" or not (name in _SAME or name in _ARITHMETIC):
        return None
    count = 1 if name in _SAME or name == "neg" else 2 if name in ("mul", "minimum", "maximum") else 3
    given = [_operand(argument, step, known) for argument in operands(node)[:count]]
    if any(argument is None for argument in given):
        return None
    return given[0] if name in _SAME else _ARITHMETIC[name](*given)


def _held(tensor: torch.Tensor) -> sympy.Expr | None:
    """The integer in a tensor of one element that the model holds."""
    if tensor.is_meta or tensor.numel() != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        return None
    return sympy.Integer(int(tensor))


def _operand(argument: Any, step: Step, known: Mapping[int, sympy.Expr]) -> sympy.Expr | None:
    if isinstance(argument, fx.Node):
        value = step.values[argument]
        return known.get(value.number) if isinstance(value, Value) else None
    if isinstance(argument, bool) or not isinstance(argument, (int, torch.SymInt)):
        return None
    return expression(argument)


def _sliced(step: Step, known: Mapping[int, sympy.Expr], found: dict[sympy.Symbol, sympy.Expr]) -> None:
    """The length of a slice with a step of 1, between bounds that are known."""
    source, dim, start, end, stride = operands(step.node)
    size = shape(step.node)[dim]
    if not _from_data(size) or size in found or stride != 1:
        return
    whole = shape(source)[dim].xreplace(found)
    bounds = [
        default if bound is None else _operand(bound, step, known)
        for bound, default in ((start, sympy.S.Zero), (end, whole))
    ]
    if not any(bound is None for bound in bounds):
        first, last = (_place(bound, whole) for bound in bounds if bound is not None)
        found[size] = _at_least_nothing(last - first)


def _place(bound: sympy.Expr, whole: sympy.Expr) -> sympy.Expr:
    """Where in a dimension a bound lies: from its end, where it is negative, and never outside."""
    low, high = _range(bound)
    if high < 0:
        bound = bound + whole
    elif low < 0:
        bound = sympy.Piecewise((bound + whole, bound < 0), (bound, True))
    if _range(bound - whole)[1] > 0:
        bound = Min(bound, whole)
    return bound if _range(bound)[0] >= 0 else Max(bound, sympy.S.Zero)


def _at_least_nothing(size: sympy.Expr) -> sympy.Expr:
    return size if _range(size)[0] >= 0 else Max(size, sympy.S.Zero)


def _range(bound: sympy.Expr) -> tuple[float, float]:
    """Between which numbers an expression of sizes lies."""
    if bound.is_number:
        return float(bound), float(bound)
    if bound.has(sympy.Piecewise):
        return -math.inf, math.inf
    free = {symbol: ValueRanges(sympy.S.Zero, sympy.oo) for symbol in bound.free_symbols}
    found = bound_sympy(bound, free)
    return float(found.lower), float(found.upper)
