"""Remove what does nothing: whole slices, empty casts, split concatenations, constants' copies, dead nodes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxreuse.finding.axes import sizes
from fxreuse.nodes import argument, is_call, remove_dead, replace
from fxreuse.program import Program

from .steps import Pass

_END = 2**63 - 1
_ALIASES = (
    torch.ops.aten.lift_fresh_copy.default,
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.alias.default,
)


@Pass
def clean(program: Program) -> None:
    """Fold no-op nodes and erase dead ones, random draws and assertions among them. Exact tier.

    Sound because each fold returns a value that is equal to the bit, and because an erased node was read by nobody and
    wrote nothing. In-place operators are functional by now, so that sharing a value cannot be noticed; a graph that
    still has one keeps the copies of constants.
    """
    writes = any(getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in program.graph.nodes)
    for node in list(program.graph.nodes):
        same = _same_value(node, keep_copies=writes)
        if same is not None:
            replace(node, same)
    remove_dead(program.graph)


def _same_value(node: fx.Node, keep_copies: bool) -> fx.Node | None:
    """A node that has the same value, or None."""
    if is_call(node, torch.ops.aten.slice.Tensor):
        return _whole_slice(node)
    if is_call(node, operator.getitem):
        return _part_of_concatenation(node)
    if is_call(node, torch.ops.aten.to.dtype, torch.ops.aten.to.dtype_layout):
        return None
    if is_call(node, *_ALIASES) and not keep_copies:
        return _first(node)
    if is_call(node, torch.ops.aten.detach.default) and _first(node).op == "get_attr" and not keep_copies:
        return None if _first(node).meta["val"].requires_grad else _first(node)
    return None


def _first(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _whole_slice(node: fx.Node) -> fx.Node | None:
    start, end, step = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
    source, dim = _first(node), argument(node, 1, "dim", 0)
    whole = start in (None, 0) and end in (None, _END)
    return source if step == 1 and (whole or sizes(node)[dim] == sizes(source)[dim]) else None


def _part_of_concatenation(node: fx.Node) -> fx.Node | None:
    """``chunk(cat([a, b, c]), 3)[1]`` is ``b`` where the pieces are of one size."""
    split: Any = node.args[0]
    if not is_call(split, torch.ops.aten.chunk.default) or not is_call(split.args[0], torch.ops.aten.cat.default):
        return None
    joined = split.args[0]
    parts, index = joined.args[0], node.args[1]
    axes = argument(joined, 1, "dim", 0), argument(split, 2, "dim", 0)
    rank = joined.meta["val"].dim()
    if axes[0] % rank != axes[1] % rank or len(parts) != argument(split, 1, "chunks"):
        return None
    sizes = {str(part.meta["val"].shape[axes[0]]) for part in parts}
    return parts[index] if len(sizes) == 1 else None
