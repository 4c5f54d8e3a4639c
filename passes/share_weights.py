"""Sharing: the layers of a group read one parameter, which stays at one path (ResidualTransformer, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxreuse.errors import UnsupportedError
from fxreuse.nodes import call
from fxreuse.program import Program
from fxreuse.weights.parts import contiguous

from .parameters import at_top
from .weight_groups import Member, WeightGroup

_aten = torch.ops.aten


def share_weights(program: Program, groups: Sequence[WeightGroup], bias: bool) -> None:
    """Let the projections of every group read their owner's weight, and its bias. Architecture tier; in place.

    The parameter stays at the owner's path, and is passed to the other layers from there. So there is one parameter in
    the module tree, in a state dict and on disk, and no copy, cast or load can tear layers apart again. Sound as a
    rewrite because the weights have the shapes of those that they replace: `check_shapes` and `check_readers` have seen
    to it. Where a member has values alone and its owner's weight is a fused one, it reads the values' rows of that.

    Arguments:
        program: a program that the caller owns.
        groups: groups of corresponding projections.
        bias: whether biases are shared, too.
    """
    for group in groups:
        weight, added = at_top(program, group.owner.projection.weight), None
        if bias and group.owner.projection.bias is not None:
            added = at_top(program, group.owner.projection.bias)
        for member in group.members:
            if member is group.owner:
                continue
            alike = len(member.parts) == len(group.owner.parts)
            _read_from(
                program, group, member, member.projection.weight, weight, None if alike else group.owner.projection.axis
            )
            if added is not None and member.projection.bias is not None:
                _read_from(program, group, member, member.projection.bias, added, None if alike else 0)


def _read_from(
    program: Program, group: WeightGroup, member: Member, path: str, shared: fx.Node, cut_along: int | None
) -> None:
    """The readers of a member's parameter read the shared one, or the rows of it that the member has."""
    for node in list(program.graph.find_nodes(op="get_attr")):
        if str(node.target) != path or node is shared:
            continue
        read = shared if cut_along is None else _rows(program, group, member, node, shared, cut_along)
        node.replace_all_uses_with(read)
        program.graph.erase_node(node)


def _rows(program: Program, group: WeightGroup, member: Member, node: fx.Node, shared: fx.Node, axis: int) -> fx.Node:
    """The rows of the owner's parameter that a member's matrices are, made where the member read its own.

    Raises:
        UnsupportedError: they are not in one piece, nor in pieces at equal distances (one for each head).
    """
    features = torch.cat([_of_role(group.owner, part.role) for part in member.parts])
    rows = group.owner.projection.rows[features]
    reader = min(node.users)

    def insert(target: Any, *args: Any) -> fx.Node:
        return call(program.graph, target, args, {}, like=reader)

    with program.graph.inserting_before(reader):
        span = contiguous(rows)
        if span is not None:
            return insert(_aten.slice.Tensor, shared, axis, *span)
        count, step, start, length = _pieces(rows, shared.meta["val"].shape[axis], member)
        pieces = insert(_aten.unflatten.int, shared, axis, [count, step])
        return insert(
            _aten.flatten.using_ints,
            insert(_aten.slice.Tensor, pieces, axis + 1, start, start + length),
            axis,
            axis + 1,
        )


def _pieces(rows: torch.Tensor, size: int, member: Member) -> tuple[int, int, int, int]:
    """Rows as pieces: how many, from one to the next, where in it each begins, and how long each is."""
    breaks = (rows.diff() != 1).nonzero().flatten()
    length = int(breaks[0]) + 1
    count, start = len(rows) // length, int(rows[0])
    step = size // count
    expected = step * torch.arange(count)[:, None] + start + torch.arange(length)
    if count * step != size or len(rows) % length or not torch.equal(rows, expected.flatten()):
        raise UnsupportedError(
            f"{member.weight} of {member.path} cannot share the weight of its leader: its rows are not in pieces at "
            "equal distances there."
        )
    return count, step, start, length


def _of_role(owner: Member, role: str) -> torch.Tensor:
    part = owner.part(role)
    assert part is not None
    return part.features
