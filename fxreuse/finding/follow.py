"""Following a tensor through views, casts, dropout and elementwise operators: where each of its axes goes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..program import Program, tensor_inputs
from .axes import Layout, Part, broadcast, quotient, regroup, resized, size, sizes

aten = torch.ops.aten

#: Operators that give their first argument's values: copies, casts, and dropout in evaluation mode.
SAME_VALUE = frozenset({
    aten.clone, aten.contiguous, aten.detach, aten.alias, aten.lift_fresh_copy, aten.to, aten._to_copy, aten.type_as,
    aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout, aten.native_dropout,
})  # fmt: skip

_PERMUTING = frozenset({
    aten.transpose, aten.swapaxes, aten.swapdims, aten.permute, aten.movedim, aten.moveaxis, aten.t, aten.mT, aten.mH,
    aten.numpy_T, aten.adjoint,
})  # fmt: skip

#: Operators that only change into which dimensions the elements are grouped.
REGROUPING = frozenset({
    aten.reshape, aten.view, aten._unsafe_view, aten._reshape_copy, aten.view_as, aten.reshape_as, aten.flatten,
    aten.unflatten, aten.unsqueeze, aten.squeeze, aten.ravel,
})  # fmt: skip

#: Operators that repeat elements without copying them.
EXPANDING = frozenset({aten.expand, aten.expand_as, aten.broadcast_to})

#: Operators that take a range of an axis, lengthen it, or move its elements about.
_RESIZING = frozenset({
    aten.slice, aten.narrow, aten.pad, aten.constant_pad_nd, aten.cat, aten.concat, aten.roll, aten.flip,
})  # fmt: skip

#: Operators whose result shares its storage with their first argument, or may.
VIEWS = _PERMUTING | REGROUPING | EXPANDING | {aten.slice, aten.narrow, aten.select, aten.alias, aten.detach}

#: Operators that give several ranges of an axis.
SPLITTING = frozenset({aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split})

#: Elementwise operators that do not carry torch's tag for them, and others that keep every axis at its place.
_KEEPING = frozenset({
    aten.where, aten.masked_fill, aten.multiply, aten.divide, aten.subtract, aten.true_divide, aten.__and__,
    aten.__or__, aten.softmax, aten._softmax, aten._safe_softmax, aten.special_softmax, aten.log_softmax,
    aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten._fused_rms_norm, aten.group_norm, aten.batch_norm,
    aten.instance_norm, aten.cumsum,
})  # fmt: skip


def packet(node: fx.Node) -> Any:
    """The ATen operator of a call without its overload (``aten.add`` of ``aten.add.Tensor``), or the target itself."""
    return getattr(node.target, "overloadpacket", node.target)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by the names of its schema, defaults included."""
    declared = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in declared), node.args, strict=False))
    return {a.name: a.default_value for a in declared if a.has_default_value()} | given | dict(node.kwargs)


def is_elementwise(node: fx.Node) -> bool:
    """Whether a node is an operator whose every element depends on the same element of its arguments."""
    if packet(node) in (aten.where, aten.masked_fill, aten.multiply, aten.divide, aten.subtract, aten.true_divide):
        return True
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_transparent_module(node: fx.Node, program: Program) -> bool:
    """Whether a node calls a module that is the identity in evaluation mode: one tensor in, the same shape out."""
    if node.op != "call_module" or len(node.all_input_nodes) != 1:
        return False
    module = program.module.get_submodule(str(node.target))
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return False
    return sizes(node) == sizes(node.all_input_nodes[0])


def is_same_value(node: fx.Node, program: Program) -> bool:
    """Whether a node gives its first argument's values in evaluation mode, in the same layout."""
    return packet(node) in SAME_VALUE or is_transparent_module(node, program)


def transfer(node: fx.Node, operand: fx.Node, layout: Layout, program: Program) -> Layout | None:
    """The layout of ``node`` where that of its ``operand`` is ``layout``; None where axes cannot be followed."""
    if node.op == "call_module":
        return layout if _keeps_shape(node, operand) else None
    if node.op != "call_function":
        return None
    op = packet(node)
    if op is operator.getitem:
        return _taken(node, operand, layout)
    if op in SAME_VALUE:
        return layout if operand is node.args[0] else None
    if op in _KEEPING or is_elementwise(node):
        return broadcast(layout, sizes(operand), sizes(node))
    handler = _HANDLERS.get(op)
    return None if handler is None else handler(node, operand, layout)


def followable(node: fx.Node, program: Program) -> list[fx.Node]:
    """The operands whose axes are found again in the node's value, those of its full size first."""
    shape = sizes(node) if isinstance(node.meta.get("val"), torch.Tensor) else None
    operands = [o for o in node.all_input_nodes if isinstance(o.meta.get("val"), (torch.Tensor, tuple, list))]
    found = [o for o in operands if transfer(node, o, _blank(o), program) is not None]
    return sorted(found, key=lambda o: sizes(o) != shape)


def _blank(node: fx.Node) -> Layout:
    return tuple((Part(None, s),) for s in sizes(node))


def _keeps_shape(node: fx.Node, operand: fx.Node) -> bool:
    return len(node.all_input_nodes) == 1 and sizes(node) == sizes(operand)


def _permuted(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    """Read off the operator itself, run on a tensor whose sizes tell its dimensions apart."""
    probe = torch.empty(tuple(range(2, 2 + len(layout))), device="meta")
    order = node.target(probe, *node.args[1:], **node.kwargs).shape  # type: ignore[operator]
    return tuple(layout[s - 2] for s in order)


def _regrouped(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    return regroup(layout, sizes(node)) if operand is node.args[0] else None


def _expanded(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    return broadcast(layout, sizes(operand), sizes(node)) if operand is node.args[0] else None


def _resized(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    before, after = sizes(operand), sizes(node)
    if len(before) != len(after):
        return None
    return tuple(dim if old == new else resized(dim, new) for dim, old, new in zip(layout, before, after, strict=True))


def _repeated(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    before, after = sizes(operand), sizes(node)
    extra = len(after) - len(before)
    result: list[tuple[Part, ...]] = [(Part(None, s),) for s in after[:extra]]
    for dim, old, new in zip(layout, before, after[extra:], strict=True):
        times = quotient(new, old)
        if times is None:
            return None
        result.append(dim if times == 1 else (Part(None, times), *dim))
    return tuple(result)


def _interleaved(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    before, after = sizes(operand), sizes(node)
    if len(before) != len(after):
        return None
    result = []
    for dim, old, new in zip(layout, before, after, strict=True):
        times = quotient(new, old)
        if times is None:
            return None
        result.append(dim if times == 1 else (*dim, Part(None, times)))
    return tuple(result)


def _selected(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    dim = arguments(node)["dim"] % len(layout)
    return (*layout[:dim], *layout[dim + 1 :])


def _stacked(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    dim = arguments(node)["dim"] % (len(layout) + 1)
    return (*layout[:dim], (Part(None, sizes(node)[dim]),), *layout[dim:])


def _transposed(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    """An einsum of one tensor, if all that it does is to transpose it."""
    before, arrow, after = node.args[0].replace(" ", "").partition("->")  # type: ignore[union-attr]
    if not arrow or "." in before or sorted(before) != sorted(after) or len(set(before)) != len(layout):
        return None
    return tuple(layout[before.index(label)] for label in after)


def _as_complex(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    return layout[:-1]


def _as_real(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    return (*layout, (Part(None, 2),))


def _all_of_several(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    return layout


def _taken(node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | None:
    """One of several results: a range of the split axis, or a slice without the unbound one."""
    op = packet(operand)
    if op is aten.unbind:
        dim = arguments(operand)["dim"] % len(layout)
        return (*layout[:dim], *layout[dim + 1 :])
    after = sizes(node)
    if op in SPLITTING:
        before = [size(s) for s in next(tensor_inputs(operand)).meta["val"].shape]
        return tuple(
            dim if old == new else resized(dim, new) for dim, old, new in zip(layout, before, after, strict=True)
        )
    return layout if node.args[1] == 0 and len(after) == len(layout) else None


_HANDLERS: dict[Any, Callable[[fx.Node, fx.Node, Layout], Layout | None]] = {
    **dict.fromkeys(_PERMUTING, _permuted),
    **dict.fromkeys(REGROUPING, _regrouped),
    **dict.fromkeys(EXPANDING, _expanded),
    **dict.fromkeys(_RESIZING, _resized),
    **dict.fromkeys(SPLITTING, _all_of_several),
    aten.unbind: _all_of_several,
    aten.repeat: _repeated,
    aten.tile: _repeated,
    aten.repeat_interleave: _interleaved,
    aten.select: _selected,
    aten.stack: _stacked,
    aten.einsum: _transposed,
    aten.view_as_complex: _as_complex,
    aten.view_as_real: _as_real,
}
