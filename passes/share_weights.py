"""Sharing: the layers of a group read one parameter, which stays at one path (ResidualTransformer, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fxreuse.nodes import call
from fxreuse.parts import contiguous
from fxreuse.program import Program
from fxreuse.tree import free_path

from .parameters import add_index, at_top
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
    """The rows of the owner's parameter that a member's matrices are, made where the member read its own."""
    features = torch.cat([_of_role(group.owner, part.role) for part in member.parts])
    rows = group.owner.projection.rows[features]
    reader = min(node.users)
    span = contiguous(rows)
    with program.graph.inserting_before(reader):
        if span is not None:
            return call(program.graph, _aten.slice.Tensor, (shared, axis, *span), {}, like=reader)
        path = free_path(program.module, member.projection.weight.rpartition(".")[0], "rows")
        index = add_index(program, path, rows, like=shared)
        return call(program.graph, _aten.index_select.default, (shared, axis, index), {}, like=reader)


def _of_role(owner: Member, role: str) -> torch.Tensor:
    part = owner.part(role)
    assert part is not None
    return part.features
