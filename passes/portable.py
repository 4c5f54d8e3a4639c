"""Take the device and the dtype of the capture out of the graph, so that ``.to()``, ``.double()`` and autocast mean
what they always mean."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import fx

from fxreuse.nodes import inserting_before, is_call, replace
from fxreuse.program import FOLLOWS, Program, get_attribute

from .pinned import names_type, typing_operands
from .steps import Pass

_ASSERTIONS = (
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten._assert_scalar.default,
)


@Pass
def free_devices(program: Program) -> None:
    """Factory calls make their tensors on the device of the first input; casts to the capture's device go. Exact tier.

    Sound because the capture ran on one device: whatever named it, named the device of the inputs.
    """
    anchor = next(iter(program.graph.find_nodes(op="placeholder")), None)
    if anchor is None:
        return
    device: fx.Node | None = None
    for node in list(program.graph.nodes):
        if is_call(node, *_ASSERTIONS):
            program.graph.erase_node(node)
        elif is_call(node, torch.ops.aten.to.device) or is_call(
            node, torch.ops.aten.to.dtype_layout, torch.ops.aten._to_copy.default
        ):
            _cast_dtype_only(node)
        elif isinstance(node.kwargs.get("device"), torch.device):
            if device is None:
                device = _device_node(program.graph, anchor)
            node.update_kwarg("device", device)
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "pin_memory"}


def _device_node(graph: fx.Graph, anchor: fx.Node) -> fx.Node:
    last = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(last):
        node = graph.call_function(getattr, (anchor, "device"))
    node.meta["val"] = anchor.meta["val"].device
    return node


def _cast_dtype_only(node: fx.Node) -> None:
    """``to(device, dtype)`` becomes ``to(dtype)``, and nothing where the dtype was that of the value already."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dtype = node.args[2] if node.target is torch.ops.aten.to.device else node.kwargs.get("dtype")
    own = source.meta["val"].dtype
    if node.kwargs.get("copy") or (node.target is torch.ops.aten.to.device and len(node.args) > 4 and node.args[4]):
        with inserting_before(node) as insert:
            source = insert(torch.ops.aten.clone.default, source)
    if dtype in (None, own) and (node.meta.get(FOLLOWS) or not own.is_floating_point):
        replace(node, source)
        return
    with inserting_before(node) as insert:
        made = insert(torch.ops.aten.to.dtype, source, dtype or own)
    made.meta[FOLLOWS] = node.meta.get(FOLLOWS, False)
    replace(node, made)


@Pass
def free_dtypes(program: Program) -> None:
    """Casts and factories that name the model's own floating dtype take it from a tensor that has it. Exact tier.

    ``x.to(float32)`` in the graph may have been ``x.float()``, which stays, or ``x.to(input.dtype)``, which follows the
    model. Which of the two it was stands in ``meta``, as seen by capturing the model in another dtype. A cast that
    follows becomes ``x.type_as(y)``: ``y`` is what the nearest fixed cast upstream was applied to (a norm that computes
    in float32 and casts back) unless that, too, comes out of one, or else a floating parameter.
    """
    pinned: set[fx.Node] = set()
    for node in list(program.graph.nodes):
        anchor = _dtype_anchor(program, node, pinned) if node.meta.get(FOLLOWS) else None
        if anchor is None:
            if names_type(node) or not pinned.isdisjoint(typing_operands(node)):
                pinned.add(node)
            continue
        with inserting_before(node) as insert:
            if is_call(node, torch.ops.aten.to.dtype):
                replace(node, insert(torch.ops.aten.type_as.default, node.args[0], anchor))
            elif isinstance(node.kwargs.get("dtype"), torch.dtype):
                node.update_kwarg("dtype", _dtype_node(program.graph, node, anchor))


def _dtype_node(graph: fx.Graph, before: fx.Node, anchor: fx.Node) -> fx.Node:
    with graph.inserting_before(before):
        node = graph.call_function(getattr, (anchor, "dtype"))
    node.meta["val"] = anchor.meta["val"].dtype
    return node


def _dtype_anchor(program: Program, node: fx.Node, pinned: Set[fx.Node]) -> fx.Node | None:
    """A node that is before ``node`` and has the dtype that it follows, but is not ``pinned`` to it."""
    wanted = _named_dtype(node)
    seen: set[fx.Node] = set()
    frontier = list(node.all_input_nodes)
    while frontier:
        current = frontier.pop(0)
        if current in seen or not isinstance(current.meta.get("val"), torch.Tensor):
            continue
        seen.add(current)
        if _is_fixed_cast(current):
            source = current.args[0]
            if isinstance(source, fx.Node) and source.meta["val"].dtype == wanted and source not in pinned:
                return source
        frontier.extend(argument for argument in current.all_input_nodes if len(seen) < 200)
    return _floating_parameter(program, node, wanted)


def _floating_parameter(program: Program, before: fx.Node, wanted: torch.dtype | None) -> fx.Node | None:
    for candidate in program.graph.nodes:
        if candidate is before:
            return None
        if candidate.op != "get_attr" or candidate.meta["val"].dtype != wanted:
            continue
        if isinstance(get_attribute(program.module, candidate.target), torch.nn.Parameter):
            return candidate
    return None


def _named_dtype(node: fx.Node) -> torch.dtype | None:
    dtype: Any = node.args[1] if is_call(node, torch.ops.aten.to.dtype) else node.kwargs.get("dtype")
    return dtype if isinstance(dtype, torch.dtype) else None


def _is_fixed_cast(node: fx.Node) -> bool:
    """Whether a node casts to a dtype that does not follow the model: ``x.float()``, ``softmax(x, dtype=float32)``."""
    if is_call(node, torch.ops.aten.to.dtype):
        return not node.meta.get(FOLLOWS)
    if is_call(node, torch.ops.aten.softmax.int):
        return len(node.args) > 2 and node.args[2] is not None
    return False
