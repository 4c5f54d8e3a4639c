"""Sizes that the guards of a capture say are one: the batch of a decoder's memory is that of its input."""

from __future__ import annotations

import re

import sympy

from ..program import Guard, Program
from .sizes import shape

_SIZE = re.compile(r"size\(\"([^\"]*)\", (\d+)\)")


def equal_sizes(program: Program) -> dict[sympy.Symbol, sympy.Symbol]:
    """For every symbol that has to equal one of an earlier dimension of the inputs, that one.

    A guard counts where it is an equation of products of them that nothing but an empty tensor fulfils otherwise:
    24·a·b = 24·a·c, where a may be the number of frames of some samples.
    """
    nodes = zip(program.call.leaves, program.graph.find_nodes(op="placeholder"), strict=True)
    sizes = {(leaf.name, dim): size for leaf, node in nodes for dim, size in enumerate(shape(node))}
    order = [symbol for size in sizes.values() for symbol in sorted(size.free_symbols, key=str)]
    same: dict[sympy.Symbol, sympy.Symbol] = {}
    for guard in program.guards:
        pair = _equal_pair(guard, {key: size.xreplace(same) for key, size in sizes.items()})
        if pair is not None:
            first, other = sorted(pair, key=order.index)
            same = {symbol: kept.xreplace({other: first}) for symbol, kept in same.items()} | {other: first}
    return same


def _equal_pair(guard: Guard, sizes: dict[tuple[str, int], sympy.Expr]) -> tuple[sympy.Symbol, sympy.Symbol] | None:
    """The two symbols that an equation says are equal; None where a guard says anything else."""
    names = {key: sympy.Symbol(f"s{place}", positive=True) for place, key in enumerate(sizes)}
    text = _SIZE.sub(lambda found: str(names.get((found[1], int(found[2])), found[0])), guard.source)
    sides = text.split(" == ")
    if len(sides) != 2 or not all(re.fullmatch(r"[\ds*()/+ -]+", side) for side in sides):
        return None
    known = {str(symbol): symbol for symbol in names.values()}
    left, right = (sympy.parse_expr(side, local_dict=known) for side in sides)
    values = {symbol: sizes[key] for key, symbol in names.items()}
    factors = sympy.Mul.make_args(sympy.factor((left - right).xreplace(values)))
    pairs = [pair for factor in factors if (pair := _difference(factor)) is not None]
    return pairs[0] if len(pairs) == 1 else None


def _difference(expression: sympy.Expr) -> tuple[sympy.Symbol, sympy.Symbol] | None:
    """The symbols a and b of a - b.

    >>> _difference(sympy.Symbol("a") - sympy.Symbol("b"))
    (a, b)
    """
    terms = sympy.Add.make_args(expression)
    added, taken = [term for term in terms if term.is_Symbol], [-term for term in terms if (-term).is_Symbol]
    return (added[0], taken[0]) if (len(terms), len(added), len(taken)) == (2, 1, 1) else None
