"""Readable names for the symbols of a capture: ``B`` for the batch, ``T`` for tokens or frames, ``input_ids_1``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import sympy
import torch
from torch import fx

from ..program import Program
from .maps import AttentionMap
from .sizes import shape, tensor


@dataclasses.dataclass(frozen=True)
class Names:
    """What the sizes of a program are called.

    ``symbols`` maps the symbols of the capture to readable ones. ``sizes`` has an expression in readable symbols for
    every name that a person may give a size by: each symbol, the name that the capture gave it, every dimension of
    every input (``input_ids_1``), and ``T`` where it is derived from an input's length. ``inputs`` has the shape of
    every input by name. ``hints`` are the sizes that the capture saw. ``derived`` has, where ``T`` follows from an
    input's length, what ``T`` takes the place of in expressions, as an expression in ``T``.
    """

    symbols: Mapping[sympy.Symbol, sympy.Symbol]
    sizes: Mapping[str, sympy.Expr]
    inputs: Mapping[str, tuple[sympy.Expr, ...]]
    hints: Mapping[str, int]
    derived: Mapping[sympy.Expr, sympy.Expr] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Dimension:
    """A dimension of an input: what it is called, which one it is, its size, and the size that the capture saw."""

    name: str
    index: int
    size: sympy.Expr
    hint: int | None


def names_of(
    program: Program,
    maps: Sequence[AttentionMap],
    others: Iterable[sympy.Symbol] = (),
    same: Mapping[sympy.Symbol, sympy.Symbol] | None = None,
) -> Names:
    """Name the sizes of a program.

    Arguments:
        program: the program whose inputs give the names.
        maps: its attention maps, which tell tokens from other sizes.
        others: further symbols to name, which may be of no input.
        same: the symbols that have to equal others, with those: they go by the names of these.
    """
    placeholders = dict(
        zip((leaf.name for leaf in program.call.leaves), program.graph.find_nodes(op="placeholder"), strict=True)
    )
    dimensions = [dimension for leaf, node in placeholders.items() for dimension in _dimensions(leaf, node, same or {})]
    symbols = _readable(dimensions, maps, others)
    sizes: dict[str, sympy.Expr] = {str(symbol): symbol for symbol in symbols.values()}
    for old, symbol in symbols.items():
        sizes.setdefault(str(old), symbol)
    for dimension in dimensions:
        sizes.setdefault(dimension.name, dimension.size.xreplace(symbols))
    if maps and maps[0].shape[-1].free_symbols:
        sizes.setdefault("T", maps[0].shape[-1].xreplace(symbols))
    return Names(
        symbols,
        sizes,
        inputs={
            leaf: tuple(size.xreplace(same or {}).xreplace(symbols) for size in shape(node))
            for leaf, node in placeholders.items()
        },
        hints={dimension.name: dimension.hint for dimension in dimensions if dimension.hint is not None},
        derived=_derived(sizes["T"]) if "T" in sizes else {},
    )


def _derived(tokens: sympy.Expr) -> dict[sympy.Expr, sympy.Expr]:
    """What a length T of the form a·f(…) + c stands for: f(…) as an expression in T.

    >>> s = sympy.Symbol("s", integer=True, positive=True)
    >>> _derived(sympy.floor(s / 320) - 1)
    {floor(s/320): T + 1}
    """
    constant, rest = tokens.as_coeff_Add()
    factor, inner = rest.as_coeff_Mul()
    if inner.is_Symbol or not inner.is_Function:
        return {}
    return {inner: (sympy.Symbol("T", integer=True, positive=True) - constant) / factor}


def _dimensions(leaf: str, node: fx.Node, same: Mapping[sympy.Symbol, sympy.Symbol]) -> list[_Dimension]:
    hints = [
        size.node.hint if isinstance(size, torch.SymInt) and size.node.has_hint() else None
        for size in tensor(node).shape
    ]
    return [
        _Dimension(f"{_identifier(leaf)}_{index}", index, size.xreplace(same), hint)
        for index, (size, hint) in enumerate(zip(shape(node), hints, strict=True))
    ]


def _readable(
    dimensions: Sequence[_Dimension], maps: Sequence[AttentionMap], others: Iterable[sympy.Symbol]
) -> dict[sympy.Symbol, sympy.Symbol]:
    """A readable symbol for each one.

    ``T`` is the first free size of an input that is a length of an attention map, and ``B`` the first other one that
    leads an input, or comes second where the tokens lead. Any other free size is called after the dimension where it
    first appears, and one that is no dimension keeps its name.
    """
    lengths = {size for found in maps for size in found.shape[-2:]}
    free = [dimension for dimension in dimensions if dimension.size.is_Symbol]
    tokens = next((dimension for dimension in free if dimension.size in lengths), None)
    leading = 1 if tokens is not None and tokens.index == 0 else 0
    batch = next((d for d in free if d.index == leading and (tokens is None or d.size != tokens.size)), None)
    named = [(batch, "B"), (tokens, "T"), *((dimension, dimension.name) for dimension in free)]
    names: dict[sympy.Symbol, str] = {}
    for dimension, name in named:
        if dimension is not None and name not in names.values():
            names.setdefault(dimension.size, name)
    for symbol in sorted({*others, *(symbol for d in dimensions for symbol in d.size.free_symbols)}, key=str):
        names.setdefault(symbol, str(symbol))
    return {symbol: sympy.Symbol(name, **symbol.assumptions0) for symbol, name in names.items()}


def _identifier(leaf: str) -> str:
    """A leaf's name as part of a keyword.

    >>> _identifier("inputs['x'][0]")
    'inputs_x_0'
    """
    return re.sub(r"\W+", "_", leaf).strip("_")
