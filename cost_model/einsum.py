"""Multiply-accumulates of an einsum, operand pair by operand pair, in the order in which torch contracts them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import sympy

from .sizes import product

# The index of an operand's dimension: a letter of the equation, or a number for one that an ellipsis stands for.
Index = str | int
Operand = dict[Index, sympy.Expr]


def einsum_macs(
    equation: str, shapes: Sequence[tuple[sympy.Expr, ...]], path: Sequence[int] | None = None
) -> sympy.Expr:
    """The multiply-accumulates of an einsum.

    Of two operands, an index that only one of them has, and that nobody needs afterwards, is summed out first. If
    an index is then left to contract, the pair costs the product of all its index sizes; otherwise it is an
    elementwise product, which is not counted. Without a ``path`` operands are contracted from left to right; with one
    (pairs of positions, flattened) the result of a pair goes to the end.

    >>> b, t = sympy.symbols("B T")
    >>> einsum_macs("bid,bjd->bij", [(b, t, sympy.Integer(8)), (b, t, sympy.Integer(8))])
    8*B*T**2
    """
    operands, output = _parse(equation, shapes)
    steps = zip(path[::2], path[1::2], strict=True) if path else [(0, 1)] * (len(operands) - 1)
    total: sympy.Expr = sympy.Integer(0)
    for pair in steps:
        right, left = operands.pop(max(pair)), operands.pop(min(pair))
        cost, result = _contract(left, right, needed=output.union(*operands))
        total += cost
        operands.insert(len(operands) if path else 0, result)
    return total


def _contract(left: Operand, right: Operand, needed: set[Index]) -> tuple[sympy.Expr, Operand]:
    """The cost of contracting a pair, and its result, which keeps the indices in ``needed``."""
    left = {index: size for index, size in left.items() if index in right or index in needed}
    right = {index: size for index, size in right.items() if index in left or index in needed}
    union = left | right
    result = {index: size for index, size in union.items() if index in needed}
    cost = product(union.values()) if len(result) < len(union) else sympy.Integer(0)
    return cost, result


def _parse(equation: str, shapes: Sequence[tuple[sympy.Expr, ...]]) -> tuple[list[Operand], set[Index]]:
    """The operands as sizes by index, dimensions of size 1 left out (they are broadcast), and the output's indices."""
    named, output = indices(equation, [len(shape) for shape in shapes])
    return [
        {index: size for index, size in zip(names, shape, strict=True) if size != 1}
        for names, shape in zip(named, shapes, strict=True)
    ], output


def indices(equation: str, ndims: Sequence[int]) -> tuple[list[list[Index]], set[Index]]:
    """The indices of every operand's dimensions, and those of the output.

    The dimensions that an ellipsis stands for are numbered backwards from its last, -1.

    >>> named, output = indices("...ij,kj->...k", [4, 2])
    >>> named, output == {-2, -1, "k"}
    ([[-2, -1, 'i', 'j'], ['k', 'j']], True)
    """
    terms, arrow, result = equation.replace(" ", "").partition("->")
    named: list[list[Index]] = []
    for term, ndim in zip(terms.split(","), ndims, strict=True):
        before, dots, after = term.partition("...")
        hidden = range(-(ndim - len(before) - len(after)), 0) if dots else ()
        named.append([*before, *hidden, *after])
    counted = Counter(itertools.chain.from_iterable(named))
    hidden_anywhere = {index for index in counted if isinstance(index, int)}
    if not arrow:
        return named, {index for index, count in counted.items() if count == 1} | hidden_anywhere
    return named, {letter for letter in result if letter != "."} | (hidden_anywhere if "..." in result else set())
