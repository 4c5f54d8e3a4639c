"""What axes of heads and channels are: how they change their size, and how single operators carry them on or back."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from fxreuse.finding.axes import Layout, Part, Size, product, quotient, regroup, sizes
from fxreuse.finding.contractions import contraction
from fxreuse.finding.flow import FUSED
from fxreuse.finding.follow import SAME_VALUE, arguments, aten, is_elementwise, is_transparent_module, packet
from fxreuse.program import Program

#: Operators that make a tensor of given sizes.
CREATIONS = frozenset({
    aten.zeros, aten.ones, aten.empty, aten.full, aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full,
})  # fmt: skip

SPLITS = frozenset({aten.split, aten.split_with_sizes, aten.chunk})
RANGES = frozenset({aten.slice, aten.narrow})
REGROUPS = frozenset({aten.reshape, aten.view, aten.flatten, aten.unflatten, aten.unsqueeze, aten.squeeze})
_ORDERS = frozenset({
    aten.transpose, aten.permute, aten.swapaxes, aten.movedim, aten.t, aten.mT, aten.numpy_T,
})  # fmt: skip
REDUCTIONS = frozenset({aten.mean, aten.sum, aten.amax, aten.amin, aten.std, aten.var})
_EXPANSIONS = frozenset({aten.expand, aten.expand_as, aten.broadcast_to})
JOINS = frozenset({aten.cat, aten.concat})
_LIKE = frozenset({aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like})
LENGTHENING = frozenset({aten.pad, aten.constant_pad_nd})


@dataclasses.dataclass(frozen=True)
class Split:
    """From one number of heads to another."""

    old: int
    new: int


@dataclasses.dataclass(frozen=True)
class Tag:
    """What an axis is made of: ``"heads"`` or ``"channels"`` of sites that are split so."""

    kind: str
    split: Split

    def resized(self, size: Size) -> Size | None:
        """The new size of an axis that is whole."""
        times, of = (self.split.new, self.split.old) if self.kind == "heads" else (self.split.old, self.split.new)
        return quotient(size * times, of)


Axes = list[tuple[fx.Node, list[Any]]]


def aligned_axes(node: fx.Node, program: Program) -> tuple[Axes, list[Any]] | None:
    """The operands of a node and its own dimensions, where equal keys are of equal size; None for other nodes."""
    if node.op == "call_module" and is_transparent_module(node, program):
        (operand,) = node.all_input_nodes
        return [(operand, list(range(len(sizes(node)))))], list(range(len(sizes(node))))
    if node.op != "call_function":
        return None
    found = contraction(node)
    if found is not None:
        return _of_contraction(found)
    op, rank = packet(node), len(sizes(node)) if isinstance(node.meta["val"], torch.Tensor) else 0
    operands = [o for o in node.all_input_nodes if isinstance(o.meta["val"], torch.Tensor)]
    if op in FUSED:
        return _of_fused(node)
    if op in JOINS:
        dim = arguments(node)["dim"] % rank
        keys = [None if axis == dim else axis for axis in range(rank)]
        return [(operand, keys) for operand in operands], keys
    if is_elementwise(node) or op in _LIKE or (op in SAME_VALUE and len(operands) == 1):
        return [(o, list(range(rank - len(sizes(o)), rank))) for o in operands], list(range(rank))
    if op in SAME_VALUE:
        return [(operands[0], list(range(rank)))], list(range(rank))
    return None


def _of_contraction(found: Any) -> tuple[Axes, list[Any]]:
    operands: Axes = [(found.left, list(found.left_axes)), (found.right, list(found.right_axes))]
    if found.addend is not None:
        operands.append((found.addend, list(found.axes[len(found.axes) - len(sizes(found.addend)) :])))
    return operands, list(found.axes)


def _of_fused(node: fx.Node) -> tuple[Axes, list[Any]]:
    named = arguments(node)
    query, key, value = named["query"], named["key"], named["value"]
    rank = len(sizes(query))
    batch: list[Any] = list(range(rank - 2))
    grouped = [*batch[:-1], "kv heads"] if named.get("enable_gqa") else batch
    operands: Axes = [(query, [*batch, "q", "c"]), (key, [*grouped, "k", "c"]), (value, [*grouped, "k", "e"])]
    mask = named.get("attn_mask", named.get("attn_bias"))
    if mask is not None:
        operands.append((mask, [*batch, "q", "k"][rank - len(sizes(mask)) :]))
    return operands, [*batch, "q", "e"]


def reduced(node: fx.Node, layout: Layout) -> Layout:
    """The layout after a reduction over some axes."""
    named = arguments(node)
    given = named.get("dim")
    over = range(len(layout)) if given is None else [given] if isinstance(given, int) else given
    dims = {dim % len(layout) for dim in over}
    if named.get("keepdim"):
        return tuple((Part(None, 1),) if axis in dims else dim for axis, dim in enumerate(layout))
    return tuple(dim for axis, dim in enumerate(layout) if axis not in dims)


def behind_view(node: fx.Node, source: fx.Node, layout: Layout) -> Layout | None:
    """The layout of what a view is of, where that of the view is known."""
    op = packet(node)
    taken = op is operator.getitem and (packet(source) in SPLITS or packet(source) is aten.unbind)
    shape = sizes(source.all_input_nodes[0] if taken else source)
    if op in REGROUPS:
        return regrouped(layout, shape)
    if op in _ORDERS:
        probe = torch.empty(tuple(range(2, 2 + len(shape))), device="meta")
        order = node.target(probe, *node.args[1:], **node.kwargs).shape  # type: ignore[operator]
        return tuple(layout[list(order).index(axis + 2)] for axis in range(len(shape)))
    if op in _EXPANSIONS:
        own = layout[len(layout) - len(shape) :]
        return tuple(dim if s != 1 else (Part(None, 1),) for dim, s in zip(own, shape, strict=True))
    if op in SPLITS or op is aten.unbind:
        return layout
    if not taken and op not in RANGES and op is not aten.select:
        return None
    dim = arguments(source if taken else node)["dim"] % len(shape)
    if op is aten.select or (taken and packet(source) is aten.unbind):
        return (*layout[:dim], (Part(None, shape[dim]),), *layout[dim:])
    times = quotient(shape[dim], sizes(node)[dim])
    if times is None:
        return None
    inner = layout[dim] if times == 1 else (Part(None, times), *layout[dim])
    return (*layout[:dim], inner, *layout[dim + 1 :])


def kinds_of(layout: Layout) -> set[str]:
    """What the axes of a layout are made of."""
    return {part.source.kind for dim in layout for part in dim if isinstance(part.source, Tag)}


def regrouped(layout: Layout, shape: tuple[Size, ...]) -> Layout | None:
    """The layout after a reshape; where axes are mixed in a way that cannot be told, those before it stay as they are.

    (A relative shift mixes queries with distances, behind the heads.)
    """
    found = regroup(layout, shape)
    if found is not None:
        return found
    own = [product(part.size for part in dim) for dim in layout]
    same = 0
    while same < min(len(own), len(shape)) and own[same] == shape[same]:
        same += 1
    if any(isinstance(part.source, Tag) for dim in layout[same:] for part in dim):
        return None
    return (*layout[:same], *((Part(None, size),) for size in shape[same:]))
