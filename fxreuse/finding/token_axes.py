"""Over which tokens an attention attends: the axes of its map, followed back to where tokens come from.

Two maps of one shape may be over different tokens: rows and columns of a square image, windows and shifted windows.
Every value of tokens has a layout (see `axes`) whose sources are axes of the values that tokens first appear in, and
which remembers how their elements were moved on the way. Sums take the oldest axis, which is that of the residual
stream. Where a value cannot be followed, its own axes are new ones; maps over axes of different origin are not
compared.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from ..tokens import Axis, Movement, Tokens, roll
from .axes import Layout, Part, Size, size, sizes, start
from .contractions import Contraction, contraction
from .flow import FUSED, Flow, value_operands
from .follow import SPLITTING, arguments, aten, is_elementwise, packet, transfer
from .value_numbers import ValueNumbers

_Dim = tuple[Part, ...]


class TokenAxes:
    """The layouts of a program's values of tokens, each made once in a pass over the graph."""

    def __init__(self, flow: Flow, numbers: ValueNumbers) -> None:
        self._flow = flow
        self._numbers = numbers
        self._layouts: dict[fx.Node, Layout] = {}
        for node in flow.order:
            if node in flow.tokens:
                self._layouts[node] = self._layout(node)

    def of_map(self, node: fx.Node) -> Tokens:
        """The tokens that a map is over; of a fused attention it is the map that it keeps to itself."""
        if packet(node) not in FUSED:
            return Tokens.of(self._layouts.get(node, ()))
        named = arguments(node)
        query, key = (self._layouts.get(named[name], ()) for name in ("query", "key"))
        return Tokens.of((*query[:-1], key[-2]) if query and key else ())

    def is_over_map(self, product: Contraction) -> bool:
        """Whether one of the operands of a product is a map: it has the tokens that are summed over once more.

        Another piece of the same axis is none of a map: a reshape may put channels where tokens were.
        """
        for operand in (product.left, product.right):
            dims = zip(product.side(operand)[0], self._layouts.get(operand, ()), strict=False)
            axes = [(label in product.summed, part) for label, dim in dims for part in dim if part.source is not None]
            summed = {(part.source, part.piece) for is_summed, part in axes if is_summed}
            if any((part.source, part.piece) in summed for is_summed, part in axes if not is_summed):
                return True
        return False

    def _layout(self, node: fx.Node) -> Layout:
        if node.op == "call_function":
            found = contraction(node)
            if found is not None:
                return self._contracted(found)
            mover = _MOVERS.get(packet(node))
            moved = None if mover is None else mover(self, node)
            if moved is not None:
                return moved
        operands = [o for o in value_operands(node) if o in self._layouts]
        layouts = [(o, transfer(node, o, self._layouts[o], self._flow.program)) for o in operands]
        followed = [_Followed(layout, _broadcast(o, node)) for o, layout in layouts if layout is not None]
        return _oldest(followed) if followed else self._new(node)

    def _new(self, node: fx.Node) -> Layout:
        order = self._flow.order[node]
        return start(node, [Axis(order, node.name, dim) for dim in range(len(sizes(node)))])

    def _contracted(self, found: Contraction) -> Layout:
        """Every operand gives the axes that it has; what comes from parameters is no axis of tokens."""
        shape = sizes(found.node)
        followed = []
        for operand in (found.left, found.right):
            if operand in self._layouts:
                own = dict(zip(found.side(operand)[0], sizes(operand), strict=True))
                missing = frozenset(i for i, label in enumerate(found.axes) if own.get(label, 1) != shape[i])
                followed.append(_Followed(found.push(operand, self._layouts[operand]), missing))
        return _oldest(followed) if followed else tuple((Part(None, s),) for s in shape)

    def _fused(self, node: fx.Node) -> Layout | None:
        query = self._layouts.get(arguments(node)["query"])
        return None if query is None else (*query[:-1], (Part(None, sizes(node)[-1]),))

    def _convolved(self, node: fx.Node) -> Layout | None:
        """A convolution that gives as many places as it has read keeps them."""
        operand = value_operands(node)[0]
        before, after = sizes(operand), sizes(node)
        if operand not in self._layouts or len(before) != len(after) or before[2:] != after[2:]:
            return None
        batch, _, *places = self._layouts[operand]
        return (batch, (Part(None, after[1]),), *places)

    def _rolled(self, node: fx.Node) -> Layout | None:
        named = arguments(node)
        operand, shifts, dims = named["self"], named["shifts"], named["dims"]
        if operand not in self._layouts or len(shifts) != len(dims):
            return None
        amounts = ((dim % len(sizes(node)), _extent(by)) for by, dim in zip(shifts, dims, strict=True))
        return self._moved(operand, {dim: roll(by, sizes(node)[dim]) for dim, by in amounts})

    def _flipped(self, node: fx.Node) -> Layout | None:
        named = arguments(node)
        if named["self"] not in self._layouts:
            return None
        return self._moved(named["self"], {dim % len(sizes(node)): Movement("flip") for dim in named["dims"]})

    def _sliced(self, node: fx.Node) -> Layout | None:
        named = arguments(node)
        operand = named["self"]
        if operand not in self._layouts:
            return None
        dim = named["dim"] % len(sizes(node))
        before, after = sizes(operand)[dim], sizes(node)[dim]
        if before == after:
            return self._layouts[operand]
        step = named.get("step", 1)
        first = _extent(named["start"] or 0)
        if step != 1:
            return self._moved(operand, {dim: Movement("step", (first, _extent(step)))}, after)
        first = before + first if isinstance(first, int) and first < 0 else first
        return self._cut(operand, dim, first, after)

    def _cut(self, operand: fx.Node, dim: int, first: Size, length: Size) -> Layout:
        """A range of one dimension."""
        return self._moved(operand, {dim: Movement("slice", (first, first + length, sizes(operand)[dim]))}, length)

    def _split(self, node: fx.Node) -> Layout | None:
        """One of several results of a split: a range that starts where the results before it end."""
        several, index = node.args[:2]
        if not isinstance(several, fx.Node) or packet(several) not in SPLITTING or not isinstance(index, int):
            return None
        operand = several.args[0]
        if not isinstance(operand, fx.Node) or operand not in self._layouts:
            return None
        dim = arguments(several)["dim"] % len(sizes(operand))
        widths = [size(part.shape[dim]) for part in several.meta["val"]]
        return self._cut(operand, dim, sum(widths[: index % len(widths)]), widths[index])

    def _padded(self, node: fx.Node) -> Layout | None:
        named = arguments(node)
        operand, widths = named["self"], list(named["pad"])
        if operand not in self._layouts:
            return None
        layout, rank = self._layouts[operand], len(sizes(node))
        for place, (before, after) in enumerate(zip(widths[::2], widths[1::2], strict=True)):
            if before != 0 or after != 0:
                dim = rank - 1 - place
                layout = _with(layout, dim, _move(layout[dim], Movement("pad", (_extent(before),)), sizes(node)[dim]))
        return layout

    def _joined(self, node: fx.Node) -> Layout | None:
        """Ranges of one axis in their order are that axis; anything else is a new one."""
        named = arguments(node)
        joined = named["tensors"]
        operands = [o for o in joined if o in self._layouts]
        dim = named["dim"] % len(sizes(node))
        if not operands or any(len(sizes(o)) != len(sizes(node)) for o in joined):
            return None
        layout = _oldest([_Followed(self._layouts[o]) for o in operands])
        dims, length = [self._layouts[o][dim] for o in operands], sizes(node)[dim]
        if all(part.source is None for each in dims for part in each):
            return _with(layout, dim, (Part(None, length),))
        if len(operands) == 1:
            before = sum(sizes(o)[dim] for o in joined[: joined.index(operands[0])])
            return _with(layout, dim, _move(dims[0], Movement("pad", (before,)), length))
        new = Axis(self._flow.order[node], node.name, dim)
        whole = _whole(dims) if len(operands) == len(joined) else None
        return _with(layout, dim, whole or (Part(new, length),))

    def _indexed(self, node: fx.Node) -> Layout | None:
        """One dimension read at an index of one dimension."""
        named = arguments(node)
        operand, index = named["self"], named.get("index", named.get("indices"))
        dim = named.get("dim")
        if isinstance(index, (list, tuple)):
            given = [place for place, each in enumerate(index) if each is not None]
            dim, index = (given[0], index[given[0]]) if len(given) == 1 else (None, None)
        if operand not in self._layouts or dim is None or not isinstance(index, fx.Node):
            return None
        if len(sizes(node)) != len(sizes(operand)):
            return None
        dim %= len(sizes(node))
        return self._moved(operand, {dim: Movement("index", (self._numbers(index),))}, sizes(node)[dim])

    def _moved(self, operand: fx.Node, moves: dict[int, Movement], length: Size | None = None) -> Layout:
        layout = self._layouts[operand]
        for dim, movement in moves.items():
            layout = _with(layout, dim, _move(layout[dim], movement, sizes(operand)[dim] if length is None else length))
        return layout


_MOVERS: dict[Any, Callable[[TokenAxes, fx.Node], Layout | None]] = {
    **dict.fromkeys(FUSED, TokenAxes._fused),
    aten.conv1d: TokenAxes._convolved,
    aten.conv2d: TokenAxes._convolved,
    aten.conv3d: TokenAxes._convolved,
    aten.roll: TokenAxes._rolled,
    aten.flip: TokenAxes._flipped,
    aten.slice: TokenAxes._sliced,
    operator.getitem: TokenAxes._split,
    aten.pad: TokenAxes._padded,
    aten.constant_pad_nd: TokenAxes._padded,
    aten.cat: TokenAxes._joined,
    aten.concat: TokenAxes._joined,
    aten.index: TokenAxes._indexed,
    aten.index_select: TokenAxes._indexed,
    aten.gather: TokenAxes._indexed,
}


def _move(dim: _Dim, movement: Movement, length: Size) -> _Dim:
    """A dimension whose elements were moved; where it has no axis of tokens, that cannot be told."""
    axis = _axis(dim)
    return (Part(None if axis is None else axis.moved_by(movement), length),)


def _axis(dim: _Dim) -> Axis | None:
    """A dimension as one axis: of several parts, a new one that is made of them."""
    axes = [
        part.source.moved_by(Movement("part", part.piece)) if part.piece else part.source
        for part in dim
        if isinstance(part.source, Axis)
    ]
    if len(axes) != len(dim) or not axes:
        return None
    return axes[0] if len(axes) == 1 else Axis(max(a.origin for a in axes), "·".join(map(str, axes)), None)


def _whole(dims: list[_Dim]) -> _Dim | None:
    """The axis of which these are all ranges, as they are or with some from its end moved to its front."""
    found = [part for dim in dims for part in dim]
    axes = [part.source for part in found if isinstance(part.source, Axis) and not part.piece]
    ranges: list[Any] = [
        axis.movements[-1].amounts for axis in axes if axis.movements and axis.movements[-1].kind == "slice"
    ]
    bases = {dataclasses.replace(axis, movements=axis.movements[:-1]) for axis in axes}
    if len(found) != len(dims) or len(ranges) != len(found) or len(bases) != 1:
        return None
    (base,) = bases
    full = ranges[0][2]
    spans = [(first, last) for first, last, _ in ranges]
    joints = sum(one[1] != other[0] for one, other in zip(spans, spans[1:] + spans[:1], strict=True))
    if joints == 1 and spans[0][0] == 0 and spans[-1][1] == full:
        return (Part(base, full),)
    turned = [one[1] == full and other[0] == 0 for one, other in itertools.pairwise(spans)]
    if joints == 1 and sum(turned) == 1:
        return (Part(base.moved_by(roll(-spans[0][0], full)), full),)
    return None


def _with(layout: Layout, dim: int, new: _Dim) -> Layout:
    return (*layout[:dim], new, *layout[dim + 1 :])


@dataclasses.dataclass(frozen=True)
class _Followed:
    """A layout of a value in terms of one of its operands, and the dimensions that this operand does not have."""

    layout: Layout
    missing: frozenset[int] = frozenset()

    @property
    def age(self) -> tuple[float, int]:
        """Smaller for older layouts, and for those that less was done to."""
        axes = [part.source for dim in self.layout for part in dim if isinstance(part.source, Axis)]
        youngest = max((axis.origin for axis in axes), default=float("inf"))
        return youngest, sum(len(axis.movements) for axis in axes)


def _oldest(layouts: list[_Followed]) -> Layout:
    """Of several layouts of one value the oldest, and where it has no dimension the oldest one that has."""
    ordered = sorted(layouts, key=lambda followed: followed.age)
    return tuple(
        next((each.layout[dim] for each in ordered if dim not in each.missing), ordered[0].layout[dim])
        for dim in range(len(ordered[0].layout))
    )


def _broadcast(operand: fx.Node, node: fx.Node) -> frozenset[int]:
    """The dimensions of a node along which an operand of it has only one element."""
    own, shape = sizes(operand), sizes(node)
    extra = len(shape) - len(own)
    if extra < 0 or (len(own) != len(shape) and not is_elementwise(node)):
        return frozenset()
    return frozenset(range(extra)) | {extra + i for i, s in enumerate(own) if s == 1 and shape[extra + i] != 1}


def _extent(value: Any) -> Size:
    return size(value.meta["val"]) if isinstance(value, fx.Node) else size(value)
