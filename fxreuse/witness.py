"""A second capture in another dtype, to tell ``x.to(float32)`` from ``x.to(input.dtype)``.

The two leave the same node in a float32 graph. In a capture of the same model in float64 they differ: the first still
names float32, the second names float64. Nothing is computed or copied for it: the twin lives on the meta device.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .inputs import Inputs
from .mode_modules import marked
from .nodes import map_nodes
from .program import FOLLOWS, Program
from .record import Note

_TO = torch.ops.aten.to.dtype
# Export keeps or drops these by the strides that a kernel is thought to return, which differ between devices.
_BOOKKEEPING = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten.contiguous.default,
    torch.ops.aten.clone.default,
}
_RESHAPES = {torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default}


def mark_dtypes(program: Program, model: torch.nn.Module, inputs: Inputs) -> tuple[Note, ...]:
    """Mark the nodes that name a floating dtype because the model has it: ``meta[FOLLOWS] = True``.

    Where the model cannot be captured in another dtype, a cast that changes nothing is taken to follow the model, and a
    note says so.
    """
    own = _model_dtype(model)
    nodes = list(_calls(program.module))
    suspects = [node for node in nodes if own is not None and own in _dtypes(node)]
    if own is None or not suspects:
        return ()
    twin_nodes = _twin_calls(model, inputs, torch.float64 if own != torch.float64 else torch.float32)
    if twin_nodes is None or [_kind(n) for n in twin_nodes] != [_kind(n) for n in nodes]:
        for node in suspects:
            node.meta[FOLLOWS] = node.target is not _TO or node.args[0].meta["val"].dtype == own  # type: ignore[union-attr]
        text = f"whether {len(suspects)} casts to {own} are fixed or follow the model's dtype could not be seen"
        return (
            Note("capture", program.name, text, "after .double() or .half() results may differ from the original's"),
        )
    for node, twin in zip(nodes, twin_nodes, strict=True):
        if own in _dtypes(node) and own not in _dtypes(twin):
            node.meta[FOLLOWS] = True
    _read_uncast(dict(zip(nodes, twin_nodes, strict=True)))
    return ()


def _read_uncast(twins: dict[fx.Node, fx.Node]) -> None:
    """Let nodes read a value before a cast that changed nothing where their twins do.

    ``x.to(float32)`` of a float32 tensor gives ``x`` itself, and export takes every later use of ``x`` for one of the
    cast. In the other dtype the two are apart.
    """
    for node, twin in twins.items():
        read, twin_read = _positions(node), _positions(twin)
        if len(read) != len(twin_read):
            continue
        wanted = iter([_uncast(mine, its, twins) for mine, its in zip(read, twin_read, strict=True)])
        node.args, node.kwargs = map_nodes((node.args, node.kwargs), functools.partial(_next, wanted))


def _positions(node: fx.Node) -> list[fx.Node]:
    """The nodes in the arguments of a node, position by position."""
    found: list[fx.Node] = []
    map_nodes((node.args, node.kwargs), found.append)
    return found


def _next(nodes: Iterator[fx.Node], _: fx.Node) -> fx.Node:
    return next(nodes)


def _uncast(read: fx.Node, twin_read: fx.Node, twins: dict[fx.Node, fx.Node]) -> fx.Node:
    """The value before a chain of casts that the twin reads, or what is read already."""
    source = read
    while source.target is _TO and (cast := twins.get(source)) is not None:
        before = source.args[0]
        assert isinstance(before, fx.Node)
        if cast.args[0] is twin_read:
            return before
        source = before
    return read


def _kind(node: fx.Node) -> object:
    return "reshape" if node.target in _RESHAPES else node.target


def _model_dtype(model: torch.nn.Module) -> torch.dtype | None:
    """The floating dtype of all parameters, or None where there are several or none."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else None


def _dtypes(node: fx.Node) -> list[torch.dtype]:
    return [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, torch.dtype)]


def _calls(module: torch.nn.Module) -> Iterator[fx.Node]:
    """The operator calls of a graph module and of the regions inside it, in a fixed order, bookkeeping left out."""
    assert isinstance(module, fx.GraphModule)
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(region := getattr(module, str(node.target), None), fx.GraphModule):
            yield from _calls(region)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if node.target not in _BOOKKEEPING:
                yield node
        elif node.op == "output":
            yield node


def _twin_calls(model: torch.nn.Module, inputs: Inputs, dtype: torch.dtype) -> list[fx.Node] | None:
    from .capture import export

    def convert(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_like(value, device="meta", dtype=dtype if value.is_floating_point() else value.dtype)

    try:
        twin = _meta_copy(model, convert)
        given = Inputs(*pytree.tree_map(convert, (inputs.args, dict(inputs.kwargs))))
        with marked(twin):
            exported, _ = export(twin, given, attempts=1)
    except Exception:
        return None
    return list(_calls(exported.module(check_guards=False)))


def _meta_copy(model: torch.nn.Module, convert: Any) -> torch.nn.Module:
    """A deep copy whose tensors were all converted, made without copying the weights."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = torch.nn.Parameter(convert(parameter.detach()), parameter.requires_grad)
        tensors = [*module._buffers.values(), *(v for v in module.__dict__.values() if isinstance(v, torch.Tensor))]
        memo.update({id(tensor): convert(tensor) for tensor in tensors if tensor is not None})
    return copy.deepcopy(model, memo)
