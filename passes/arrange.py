"""Bring the axes of a tensor into another order and grouping, by what the axes are and not by where they are.

An attention may be written with any layout: heads in the batch, queries and keys swapped, heads in groups. Here a
tensor is a `Term`: a node and, for every dimension, the axes that it consists of (`fxreuse.finding.axes.Layout`).
`Arranger.arrange` makes the views that lead to another layout. Axes of size 1 are in no layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import fx

from fxreuse.finding.axes import Layout, Part, Size

_aten = torch.ops.aten

Insert: TypeAlias = Callable[..., fx.Node]
_Key: TypeAlias = tuple[Hashable, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Term:
    """A tensor and the axes that its dimensions consist of."""

    node: fx.Node
    layout: Layout


class UnclearAxes(Exception):
    """Axes that are split in two ways, or whose size is that of no tensor at hand."""


def without_ones(layout: Layout) -> Layout:
    """The layout without axes of size 1."""
    return tuple(tuple(part for part in dim if part.size != 1) for dim in layout)


class Arranger:
    """The axes of the tensors around one attention, cut into the smallest pieces that any of their layouts has."""

    def __init__(self, layouts: Iterable[Layout], terms: Iterable[Term] = ()) -> None:
        """``terms`` are tensors from which the sizes of axes may be read, and whose layouts count, too."""
        terms = list(terms)
        self._sizes: dict[_Key, Size] = {}
        for layout in (*layouts, *(term.layout for term in terms)):
            for part in (part for dim in without_ones(layout) for part in dim):
                if self._sizes.setdefault((part.source, part.piece), part.size) != part.size:
                    raise UnclearAxes(f"axis {part.source} is split in two ways")
        self._providers: dict[_Key, tuple[fx.Node, int]] = {}
        for term in terms:
            self._provide(term.node, [self.pieces(dim) for dim in term.layout])

    def pieces(self, dim: Iterable[Part]) -> tuple[_Key, ...]:
        """The smallest pieces of the axes of a dimension, outermost first."""
        return tuple(key for part in dim if part.size != 1 for key in self._cut((part.source, part.piece)))

    def _cut(self, key: _Key) -> list[_Key]:
        source, piece = key
        if not any(s == source and len(p) > len(piece) and p[: len(piece)] == piece for s, p in self._sizes):
            return [key]
        return [inner for bit in (0, 1) for inner in self._cut((source, (*piece, bit)))]

    def arrange(self, insert: Insert, term: Term, target: Layout, full: bool = False) -> fx.Node:
        """The tensor with the dimensions of ``target``.

        A dimension of which the tensor has no axis gets size 1, and with ``full`` the size that it should have.

        Raises:
            UnclearAxes: where the tensor has axes that the target has not, or a size cannot be told.
        """
        own = [self.pieces(dim) for dim in term.layout]
        wanted = [self.pieces(dim) for dim in target]
        if own == wanted:
            return term.node
        if not full and len(own) == len(wanted) and all(not a or a == b for a, b in zip(own, wanted, strict=True)):
            return term.node
        node = self._split(insert, term.node, own)
        have = [piece for dim in own for piece in dim]
        order = [have.index(piece) for dim in wanted for piece in dim if piece in have]
        if len(order) != len(have):
            raise UnclearAxes(f"an axis of {term.node.name} is not one of the attention's")
        if order != sorted(order):
            node = insert(_aten.permute.default, node, order)
        kept = [dim if full or set(dim) & set(have) else () for dim in wanted]
        return self._join(insert, node, kept, set(have))

    def _split(self, insert: Insert, node: fx.Node, dims: Sequence[tuple[_Key, ...]]) -> fx.Node:
        """One dimension for every piece."""
        for index in reversed(range(len(dims))):
            pieces = dims[index]
            if not pieces:
                node = insert(_aten.squeeze.dim, node, index)
            elif len(pieces) > 1:
                free = [piece for piece in pieces if not isinstance(self._sizes.get(piece), int)]
                sizes = [-1 if free and piece == free[0] else self._size(insert, piece) for piece in pieces]
                node = insert(_aten.unflatten.int, node, index, sizes)
        self._provide(node, [(piece,) for pieces in dims for piece in pieces])
        return node

    def _join(self, insert: Insert, node: fx.Node, dims: Sequence[tuple[_Key, ...]], have: set[_Key]) -> fx.Node:
        """From one dimension for every piece that the tensor has to the dimensions asked for."""
        sizes: list[int | fx.Node] = []
        for pieces in dims:
            for piece in pieces or (None,):
                if piece not in have:
                    node = insert(_aten.unsqueeze.default, node, len(sizes))
                sizes.append(-1 if piece is None or piece in have else self._size(insert, piece))
        if any(size != -1 for size in sizes):
            node = insert(_aten.expand.default, node, sizes)
        place = len(sizes)
        for pieces in reversed(dims):
            place -= max(len(pieces), 1)
            if len(pieces) > 1:
                node = insert(_aten.flatten.using_ints, node, place, place + len(pieces) - 1)
        return node

    def _provide(self, node: fx.Node, dims: Sequence[tuple[_Key, ...]]) -> None:
        for index, pieces in enumerate(dims):
            if len(pieces) == 1:
                self._providers.setdefault(pieces[0], (node, index))

    def _size(self, insert: Insert, piece: _Key) -> int | fx.Node:
        size = self._sizes.get(piece)
        if isinstance(size, int):
            return size
        if piece not in self._providers:
            raise UnclearAxes(f"the size of axis {piece[0]} cannot be read from a tensor that stays")
        return insert(_aten.sym_size.int, *self._providers[piece])
