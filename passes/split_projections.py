"""Fused projections taken apart: queries, keys and values from products of their own with parts of one weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
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


def split_projections(program: Program, operands: Iterable[fx.Node]) -> None:
    """Take the fused projections behind some values apart. Works on the program in place; exact tier.

    Sound because every value behind a projection is made of the same products as before: which weight row feeds which
    channel is read off the graph by pushing indices through the moves behind it, and a projection of which this cannot
    be told, or of whose rows two values have the same, is left as it is. The parameters stay whole.
    """
    for projection in _projections(program, operands):
        leaves = _leaves(projection)
        if len(leaves) > 1:
            for leaf in leaves:
                _project(program, projection, leaf)
    remove_dead(program.graph)


def _projections(program: Program, operands: Iterable[fx.Node]) -> list[Projection]:
    """The nearest projections behind some values, each once."""
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
    return list(found.values())


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
        own = set(arrangement.rows.flatten().tolist())
        if own & taken:
            return []
        taken |= own
        found.append(_Leaf(node, arrangement))
    return found


def _ends(node: fx.Node, indices: tuple[Any, Any]) -> Iterator[tuple[fx.Node, tuple[Any, Any]]]:
    users = [user for user in node.users if not is_call(user, _aten.sym_size.int)]
    if not users or any(not is_move(user) or user.args[0] is not node for user in users):
        yield node, indices
        return
    for user in users:
        yield from _ends(user, push(user, indices))


def _project(program: Program, projection: Projection, leaf: _Leaf) -> None:
    """Compute a leaf from its own rows."""
    rows = projection.rows[leaf.arrangement.rows.flatten()]
    with inserting_before(leaf.node) as insert:
        weight = _rows(program, insert, leaf, projection.weights[0], projection.axis, rows)
        weight = weight if projection.axis == 0 else insert(_aten.t.default, weight)
        bias = None
        if projection.biases:
            bias = _rows(program, insert, leaf, projection.biases[0], 0, rows)
        base = insert(_aten.linear.default, _source(projection), weight, bias)
        made = Layer(leaf.arrangement, leaf.node, insert).lay_out(base, base.meta["val"].dim() - 1)
    take_place(made, leaf.node)


def _source(projection: Projection) -> fx.Node:
    """What is projected, with batch and tokens in dimensions of their own."""
    source = projection.source
    operand = source.args[0] if packet(source) in REGROUPING else None
    if not isinstance(operand, fx.Node):
        return source
    before, after = operand.meta["val"].shape, source.meta["val"].shape
    return operand if (len(before), len(after)) == (3, 2) and before[-1] == after[-1] else source


def _rows(program: Program, insert: Insert, leaf: _Leaf, parameter: fx.Node, axis: int, rows: torch.Tensor) -> fx.Node:
    """Some rows of a parameter: a view where they lie side by side."""
    first, count = int(rows[0]), len(rows)
    if torch.equal(rows, torch.arange(first, first + count)):
        return insert(_aten.slice.Tensor, parameter, axis, first, first + count)
    path = f"{parameter.target}_rows_of_{leaf.node.name}"
    put_tensor(program, path, rows)
    return insert(_aten.index_select.default, parameter, axis, read_tensor(program, path, leaf.node))
