"""Fused projections taken apart: queries, keys and values from products of their own with parts of one weight."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxreuse.finding.follow import REGROUPING, SAME_VALUE, is_elementwise, packet
from fxreuse.layouts.arrangement import Arrangement, Insert, Layer, arrange, fits
from fxreuse.layouts.layout import indices_of, push
from fxreuse.layouts.projections import Projection, hints, is_move, read_projection, take_place
from fxreuse.nodes import inserting_before, is_call, remove_dead
from fxreuse.program import Program

from .new_tensors import put_tensor, read_tensor

_aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A value that is some rows of a projection, moved about, and how it is arranged."""

    node: fx.Node
    arrangement: Arrangement

    @property
    def rows(self) -> torch.Tensor:
        """The features of the projection, in the order in which the value has them."""
        return self.arrangement.rows.flatten()


def split_projections(program: Program, operands: Iterable[fx.Node]) -> None:
    """Take the fused projections behind some values apart. Works on the program in place; exact tier.

    What these values are made of gets a product of its own, and so does each of the rest: keys and values, say, one
    together, and queries another. Sound because every value behind a projection is made of the same products as before:
    which weight row feeds which channel is read off the graph by pushing indices through the moves behind it, and a
    projection of which this cannot be told, or of whose rows two values have the same, is left as it is. The parameters
    stay whole.
    """
    projections, behind = _projections(program, operands)
    for projection in projections:
        leaves = _leaves(projection)
        if len(leaves) > 1:
            groups = _groups(projection, leaves, behind)
            first = min(leaf.node for leaf in leaves)
            with inserting_before(first) as insert:
                weights = _shares(program, insert, first, projection, projection.weights[0], projection.axis, groups)
                biases: Sequence[fx.Node | None] = [None] * len(groups)
                if projection.biases:
                    biases = _shares(program, insert, first, projection, projection.biases[0], 0, groups)
            for group, weight, bias in zip(groups, weights, biases, strict=True):
                _project(projection, group, weight, bias)
    remove_dead(program.graph)


def _projections(program: Program, operands: Iterable[fx.Node]) -> tuple[list[Projection], set[fx.Node]]:
    """The nearest projections behind some values, each once, and the nodes from there to the values."""
    pending, seen = list(operands), set(operands)
    found: dict[fx.Node, Projection] = {}
    while pending:
        node = pending.pop()
        projection = read_projection(program, node)
        if projection is not None:
            found.setdefault(projection.node, projection)
            continue
        ahead = [operand for operand in node.all_input_nodes if operand not in seen]
        seen.update(ahead)
        pending += ahead if node.op == "call_function" and (is_move(node) or _keeps_tokens(node)) else []
    return list(found.values()), seen


def _keeps_tokens(node: fx.Node) -> bool:
    return packet(node) in SAME_VALUE or is_elementwise(node) or packet(node) in (_aten.cat, _aten.stack)


def _leaves(projection: Projection) -> list[_Leaf]:
    """The values behind the moves that follow a projection; none where these are not parts of it."""
    whole = torch.arange(len(projection.columns))
    if not torch.equal(projection.columns, whole) or projection.feature != projection.result.meta["val"].dim() - 1:
        return []
    indices, count = indices_of(hints(projection.result.meta["val"]), projection.feature)
    found: list[_Leaf] = []
    taken: set[int] = set()
    for node, (tokens, rows) in _ends(projection.result, indices):
        arrangement = arrange(tokens, rows, count) if isinstance(tokens, torch.Tensor) else None
        if arrangement is None or not fits(arrangement, node):
            return []
        leaf = _Leaf(node, arrangement)
        own = set(leaf.rows.tolist())
        if own & taken:
            return []
        taken |= own
        found.append(leaf)
    return found


def _ends(node: fx.Node, indices: tuple[Any, Any]) -> Iterator[tuple[fx.Node, tuple[Any, Any]]]:
    users = [user for user in node.users if not is_call(user, _aten.sym_size.int)]
    if not users or any(not is_move(user) or user.args[0] is not node for user in users):
        yield node, indices
        return
    for user in users:
        yield from _ends(user, push(user, indices))


def _groups(projection: Projection, leaves: list[_Leaf], behind: set[fx.Node]) -> list[list[_Leaf]]:
    """The leaves that one product is to give: those that are behind the values, where no more copies come of that.

    A product with rows that lie side by side reads the weight itself, any other a copy of some rows.
    """
    together = sorted((leaf for leaf in leaves if leaf.node in behind), key=lambda leaf: int(leaf.rows.min()))
    others = [[leaf] for leaf in leaves if leaf.node not in behind]
    if together and _is_range(_rows_of(projection, together)):
        return [*others, together]
    if any(_is_range(_rows_of(projection, [leaf])) for leaf in together):
        return [*others, *([leaf] for leaf in together)]
    return [*others, together] if together else others


def _rows_of(projection: Projection, leaves: list[_Leaf]) -> torch.Tensor:
    """The rows of the weight that feed some leaves, one leaf after the other."""
    return projection.rows[torch.cat([leaf.rows for leaf in leaves])]


def _is_range(rows: torch.Tensor) -> bool:
    return torch.equal(rows, torch.arange(int(rows[0]), int(rows[0]) + len(rows)))


def _project(projection: Projection, leaves: list[_Leaf], weight: fx.Node, bias: fx.Node | None) -> None:
    """Compute leaves from their own rows, in one product."""
    with inserting_before(min(leaf.node for leaf in leaves)) as insert:
        weight = weight if projection.axis == 0 else insert(_aten.t.default, weight)
        base = insert(_aten.linear.default, _source(projection), weight, bias)
        feature = base.meta["val"].dim() - 1
        parts = _split(insert, base, feature, [len(leaf.rows) for leaf in leaves])
    for leaf, part in zip(leaves, parts, strict=True):
        with inserting_before(leaf.node) as insert:
            made = Layer(leaf.arrangement, leaf.node, insert).lay_out(part, feature)
        take_place(made, leaf.node)


def _split(insert: Insert, value: fx.Node, axis: int, sizes: list[int]) -> list[fx.Node]:
    """The parts of a value side by side along an axis: views, made by one operator, whose gradient is one copy."""
    if len(sizes) == 1:
        return [value]
    parts = insert(_aten.split_with_sizes.default, value, sizes, axis)
    return [insert(operator.getitem, parts, place) for place in range(len(sizes))]


def _source(projection: Projection) -> fx.Node:
    """What is projected, with batch and tokens in dimensions of their own."""
    source = projection.source
    operand = source.args[0] if packet(source) in REGROUPING else None
    if not isinstance(operand, fx.Node):
        return source
    before, after = operand.meta["val"].shape, source.meta["val"].shape
    return operand if (len(before), len(after)) == (3, 2) and before[-1] == after[-1] else source


def _shares(
    program: Program,
    insert: Insert,
    before: fx.Node,
    projection: Projection,
    parameter: fx.Node,
    axis: int,
    groups: list[list[_Leaf]],
) -> list[fx.Node]:
    """The rows of a parameter that each group has: views where they lie side by side, copies elsewhere."""
    rows = [_rows_of(projection, group) for group in groups]
    order = sorted(range(len(groups)), key=lambda place: int(rows[place][0]))
    if torch.equal(torch.cat([rows[place] for place in order]), torch.arange(parameter.meta["val"].shape[axis])):
        parts = _split(insert, parameter, axis, [len(rows[place]) for place in order])
        return [parts[order.index(place)] for place in range(len(groups))]
    return [
        _some_rows(program, insert, before, parameter, axis, own, group[0].node.name)
        for group, own in zip(groups, rows, strict=True)
    ]


def _some_rows(
    program: Program, insert: Insert, before: fx.Node, parameter: fx.Node, axis: int, rows: torch.Tensor, reader: str
) -> fx.Node:
    """Some rows of a parameter: a view where they lie side by side."""
    if _is_range(rows):
        return insert(_aten.slice.Tensor, parameter, axis, int(rows[0]), int(rows[0]) + len(rows))
    path = f"{parameter.target}_rows_of_{reader}"
    put_tensor(program, path, rows)
    return insert(_aten.index_select.default, parameter, axis, read_tensor(program, path, before))
