"""Where the axes of one tensor are in another: sizes, and layouts made of parts of axes.

A layout says, for every dimension of a tensor, of which axes of some source it consists, outermost first: a
``(batch · heads, T, T)`` map that came from ``(batch, T, heads · 8)`` has a first dimension of two parts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

Size: TypeAlias = "int | sympy.Expr"


@dataclasses.dataclass(frozen=True)
class Part:
    """An axis of the source, or a piece of one. ``source`` is None for an axis that the source does not have.

    ``piece`` is empty for the whole axis; otherwise it is the way to it, 0 for the outer and 1 for the inner factor
    of every split.
    """

    source: Hashable
    size: Size
    piece: tuple[int, ...] = ()


Layout: TypeAlias = "tuple[tuple[Part, ...], ...]"


def size(value: Any) -> Size:
    """A size as a number, or as a sympy expression where it is free."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return _simplified(value.node.expr)
    return value


@functools.lru_cache(maxsize=4096)
def _simplified(expression: sympy.Expr) -> Size:
    """An expression with the divisions carried out that leave no remainder (``-1`` in a reshape makes such)."""

    def divided(whole: sympy.Expr, factor: sympy.Expr) -> sympy.Expr:
        exact = quotient(whole, factor)
        return FloorDiv(whole, factor) if exact is None else sympy.sympify(exact)

    return _number_or(expression.replace(FloorDiv, divided) if expression.has(FloorDiv) else expression)


def sizes(node: fx.Node) -> tuple[Size, ...]:
    """The sizes of a node's tensor; of the first one where it has several."""
    value = node.meta["val"]
    tensor = value[0] if isinstance(value, (tuple, list)) else value
    return tuple(size(s) for s in tensor.shape)


def product(factors: Iterable[Size]) -> Size:
    """The product of sizes."""
    return math.prod(factors, start=1)


@functools.lru_cache(maxsize=4096)
def quotient(whole: Size, factor: Size) -> Size | None:
    """``whole / factor`` where it is a whole number at all sizes, else None.

    >>> batch = sympy.Symbol("batch", integer=True, positive=True)
    >>> quotient(12 * batch, 4 * batch), quotient(12 * batch, 5), quotient(96, 4)
    (3, None, 24)
    """
    if isinstance(whole, int) and isinstance(factor, int):
        return whole // factor if factor and whole % factor == 0 else None
    if whole == factor:
        return 1
    ratio = sympy.cancel(sympy.sympify(whole) / factor)
    numerator, denominator = ratio.as_numer_denom()
    if denominator != 1 or any(not c.is_integer for c in numerator.as_coefficients_dict().values()):
        return None
    return _number_or(ratio)


def _number_or(expression: sympy.Expr) -> Size:
    return int(expression) if isinstance(expression, sympy.Integer) else expression


def start(node: fx.Node, sources: Sequence[Hashable] | None = None) -> Layout:
    """The layout of a tensor in terms of itself: dimension ``i`` is the axis ``sources[i]``, or ``i``."""
    shape = sizes(node)
    return tuple((Part(i if sources is None else sources[i], s),) for i, s in enumerate(shape))


def regroup(layout: Layout, shape: Sequence[Size]) -> Layout | None:
    """The layout after a reshape to ``shape``; None where the reshape cuts axes at places that cannot be told.

    >>> _, heads, channels = regroup(((Part("T", 7),), (Part("C", 32),)), (7, 4, 8))
    >>> heads, channels
    ((Part(source='C', size=4, piece=(0,)),), (Part(source='C', size=8, piece=(1,)),))
    """
    parts = [part for dim in reversed(layout) for part in reversed(dim) if part.size != 1]
    result = []
    for target in shape:
        dim: list[Part] = []
        need: Size | None = target
        while need != 1:
            if not parts or need is None:
                return None
            part = parts.pop()
            rest = quotient(need, part.size)
            if rest is None:
                inner = quotient(part.size, need)
                if inner is None:
                    return None
                parts.append(Part(part.source, inner, (*part.piece, 1)))
                part, rest = Part(part.source, need, (*part.piece, 0)), 1
            dim.append(part)
            need = rest
        result.append(_merged(dim))
    return None if parts else tuple(result)


def _merged(dim: list[Part]) -> tuple[Part, ...]:
    """Neighbouring pieces that were one put together again."""
    merged: list[Part] = []
    for part in dim:
        while merged and _adjacent(merged[-1], part):
            outer = merged.pop()
            part = Part(part.source, outer.size * part.size, part.piece[:-1])
        merged.append(part)
    return tuple(merged)


def _adjacent(outer: Part, inner: Part) -> bool:
    return (
        outer.source == inner.source
        and bool(outer.piece and inner.piece)
        and (*outer.piece[:-1], 1) == inner.piece
        and outer.piece[-1] == 0
    )


def resized(dim: tuple[Part, ...], new: Size) -> tuple[Part, ...]:
    """A dimension of which a range was taken, or that grew: still its axis where it was one axis."""
    sources = {part.source for part in dim}
    if len(dim) == 1:
        return (Part(dim[0].source, new, dim[0].piece),)
    return (Part(sources.pop() if len(sources) == 1 else None, new),)


def broadcast(layout: Layout, own: Sequence[Size], shape: Sequence[Size]) -> Layout | None:
    """The layout of a tensor of sizes ``own`` after it was broadcast to ``shape``.

    Two free sizes that meet are equal, even where their expressions are not.
    """
    extra = len(shape) - len(own)
    if extra < 0:
        return None
    result: list[tuple[Part, ...]] = [(Part(None, s),) for s in shape[:extra]]
    for dim, before, after in zip(layout, own, shape[extra:], strict=True):
        if before == 1 and after != 1:
            result.append((Part(None, after),))
        else:
            result.append(dim if before == after else resized(dim, after))
    return tuple(result)
