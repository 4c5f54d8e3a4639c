"""A second trace in another dtype, to tell ``x.to(float32)`` from ``x.to(input.dtype)``.

The two leave the same node in a float32 graph. In a trace of the same model in float64 they differ: the first still
names float32, the second names float64. Nothing is computed or copied for it: the twin's tensors are fake. It is traced
at the sizes of the example, which takes a fraction of the time of another capture with free sizes; only where that
shows other operators than the capture has, the twin is captured as the model was.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..nodes import map_nodes
from ..program import FOLLOWS, Program
from ..record import Note
from .conversions import idle_conversions
from .example_sizes import widen_batch
from .exporting import exporting
from .inputs import Inputs
from .mode_modules import marked
from .untouched import untouched

_TO = torch.ops.aten.to.dtype
# What ``x.to(device)`` leaves: it names the dtype of ``x``, whichever that is.
_TO_DEVICE = torch.ops.aten.to.dtype_layout
# Sizes are numbers in a trace at fixed sizes.
_SIZES = {
    torch.ops.aten.sym_size.int,
    torch.ops.aten.sym_stride.int,
    torch.ops.aten.sym_numel.default,
    torch.ops.aten._assert_tensor_metadata.default,
}
# A slice that takes all of a tensor is left out at fixed sizes, and copies by the strides that a kernel returns.
_PASSED_THROUGH = {
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.contiguous.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.alias.default,
}
_RESHAPES = {torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default}
_INLINED = {torch.ops.higher_order.wrap_with_set_grad_enabled, torch.ops.higher_order.wrap_with_autocast}


def mark_dtypes(program: Program, model: torch.nn.Module, inputs: Inputs) -> tuple[Note, ...]:
    """Mark the nodes that name a floating dtype because the model has it: ``meta[FOLLOWS] = True``.

    Where the model cannot be traced in another dtype, a cast that changes nothing is taken to follow the model, and a
    note says so.
    """
    own = _model_dtype(model)
    calls = _Calls.of(program.module)
    for node in calls.nodes:
        if node.target is _TO_DEVICE:
            node.meta[FOLLOWS] = True
    suspects = [node for node in calls.nodes if own in _dtypes(node) and node.target is not _TO_DEVICE]
    if own is None or not suspects:
        return ()
    twins = _twin_calls(calls, model, inputs, torch.float64 if own != torch.float64 else torch.float32)
    if twins is None:
        for node in suspects:
            node.meta[FOLLOWS] = node.target is not _TO or node.args[0].meta["val"].dtype == own  # type: ignore[union-attr]
        text = f"whether {len(suspects)} casts to {own} are fixed or follow the model's dtype could not be seen"
        return (
            Note("capture", program.name, text, "after .double() or .half() results may differ from the original's"),
        )
    for node, twin in zip(calls.nodes, twins.nodes, strict=True):
        if own in _dtypes(node) and own not in _dtypes(twin):
            node.meta[FOLLOWS] = True
    _read_uncast(calls, twins)
    return ()


@dataclasses.dataclass(frozen=True)
class _Calls:
    """The operator calls of a graph module and of the regions inside it, in order, and last the output.

    ``outer`` has the node that a placeholder of a region, or a result of one outside of it, stands for.
    """

    nodes: list[fx.Node]
    outer: dict[fx.Node, fx.Node]

    @staticmethod
    def of(module: torch.nn.Module) -> _Calls:
        """Read a graph module."""
        assert isinstance(module, fx.GraphModule)
        calls = _Calls([], {})
        calls._read(module)
        calls.nodes.append(module.graph.output_node())
        return calls

    def _read(self, module: fx.GraphModule) -> None:
        for node in module.graph.nodes:
            if node.op == "get_attr" and isinstance(region := getattr(module, str(node.target), None), fx.GraphModule):
                self._read(region)
                for call in node.users:
                    self.outer.update(_edges(region, call) if call.target in _INLINED else ())
            elif isinstance(node.target, torch._ops.OpOverload) and node.target not in _SIZES | _PASSED_THROUGH:
                self.nodes.append(node)

    def same(self, node: fx.Node) -> fx.Node:
        """The node that gives the value, on whichever side of the boundaries of regions."""
        while node in self.outer:
            node = self.outer[node]
        return node

    def origin(self, node: fx.Node) -> fx.Node:
        """The node whose value this one is, or a slice or a copy of it."""
        node = self.same(node)
        while node.target in _PASSED_THROUGH:
            node = self.same(_operand(node))
        return node


def _edges(region: fx.GraphModule, call: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Placeholders of a region with their operands, and results outside with the nodes that give them."""
    placeholders = region.graph.find_nodes(op="placeholder")
    operands = call.args[len(call.args) - len(placeholders) :]
    (results,) = region.graph.output_node().args
    taken = [(user, results[int(user.args[1])]) for user in call.users]  # type: ignore[arg-type, index]
    for node, source in (*zip(placeholders, operands, strict=True), *taken):
        if isinstance(source, fx.Node):
            yield node, source


def _read_uncast(calls: _Calls, twins: _Calls) -> None:
    """Let nodes read a value before a cast that changed nothing where their twins do.

    ``x.to(float32)`` of a float32 tensor gives ``x`` itself, and export takes every later use of ``x`` for one of the
    cast. In the other dtype the two are apart.
    """
    twin_of = dict(zip(calls.nodes, twins.nodes, strict=True))
    for node, twin in twin_of.items():
        read, twin_read = _tensors_read(node), _tensors_read(twin)
        if len(read) != len(twin_read):
            continue
        wanted = []
        for mine, its in zip(read, twin_read, strict=True):
            reader, source = node, mine
            while source.target in _PASSED_THROUGH:
                reader, source = source, _operand(source)
            before = _uncast(source, twins.origin(its), calls, twins, twin_of)
            if reader is not node:
                reader.update_arg(0, before)
            wanted.append(before if reader is node else mine)
        replacements = iter(wanted)
        node.args, node.kwargs = map_nodes((node.args, node.kwargs), functools.partial(_next_tensor, replacements))


def _tensors_read(node: fx.Node) -> list[fx.Node]:
    """The nodes in the arguments of a node that are no sizes, position by position."""
    found: list[fx.Node] = []
    map_nodes((node.args, node.kwargs), found.append)
    return [argument for argument in found if not _is_size(argument)]


def _next_tensor(nodes: Iterator[fx.Node], argument: fx.Node) -> fx.Node:
    return argument if _is_size(argument) else next(nodes)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def _uncast(
    read: fx.Node, twin_origin: fx.Node, calls: _Calls, twins: _Calls, twin_of: dict[fx.Node, fx.Node]
) -> fx.Node:
    """The value before a chain of casts that the twin reads, or what is read already."""
    source = calls.same(read)
    while source.target in (_TO, _TO_DEVICE) and (cast := twin_of.get(source)) is not None:
        before = _operand(source)
        if twins.origin(_operand(cast)) is twin_origin:
            while before.graph is not read.graph and before in calls.outer:
                before = calls.outer[before]
            return before if before.graph is read.graph else read
        source = calls.same(before)
    return read


def _operand(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


def _kind(node: fx.Node) -> object:
    return "reshape" if node.target in _RESHAPES else node.target


def _model_dtype(model: torch.nn.Module) -> torch.dtype | None:
    """The floating dtype of all parameters, or None where there are several or none."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else None


def _dtypes(node: fx.Node) -> list[torch.dtype]:
    return [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, torch.dtype)]


def _twin_calls(calls: _Calls, model: torch.nn.Module, inputs: Inputs, dtype: torch.dtype) -> _Calls | None:
    """The calls of the model in another dtype, if they are the same operators one by one."""
    kinds = [_kind(node) for node in calls.nodes]
    ways: Sequence[Callable[..., torch.nn.Module]] = (_traced, _exported)
    for way in ways:
        try:
            with untouched(model):
                found = _Calls.of(way(model, inputs, dtype))
        except Exception:
            continue
        if [_kind(node) for node in found.nodes] == kinds:
            return found
    return None


def _traced(model: torch.nn.Module, inputs: Inputs, dtype: torch.dtype) -> torch.nn.Module:
    """The graph of a twin of fake tensors at the sizes of the example, as `torch.export` goes about it."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        twin, given = _twin(model, widen_batch(inputs), functools.partial(_like, dtype=dtype))
        leaves = [leaf for leaf in pytree.tree_leaves((given.args, given.kwargs)) if isinstance(leaf, torch.Tensor)]

        def call(*_: torch.Tensor) -> tuple[Any, ...]:
            return tuple(pytree.tree_leaves(twin(*given.args, **given.kwargs)))

        with marked(twin), exporting(), idle_conversions():
            return make_fx(call, pre_dispatch=True)(*leaves)


def _exported(model: torch.nn.Module, inputs: Inputs, dtype: torch.dtype) -> torch.nn.Module:
    """The graph of a twin on the meta device, captured as the model was."""
    from .capture import export

    twin, given = _twin(model, inputs, functools.partial(_like, dtype=dtype, device="meta"))
    with marked(twin):
        exported, _ = export(twin, given, attempts=1)
    return exported.module(check_guards=False)


def _like(tensor: torch.Tensor, dtype: torch.dtype, device: str | None = None) -> torch.Tensor:
    """An uninitialised tensor of the same sizes and strides; a floating one of another dtype."""
    kind = dtype if tensor.is_floating_point() else tensor.dtype
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device=device or tensor.device)


def _twin(
    model: torch.nn.Module, inputs: Inputs, convert: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.nn.Module, Inputs]:
    """A deep copy of the model whose tensors were all converted, made without copying weights, and such inputs."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = torch.nn.Parameter(convert(parameter), parameter.requires_grad)
        tensors = [*module._buffers.values(), *(v for v in module.__dict__.values() if isinstance(v, torch.Tensor))]
        memo.update({id(tensor): convert(tensor) for tensor in tensors if tensor is not None})
    given = pytree.tree_map_only(torch.Tensor, convert, (inputs.args, dict(inputs.kwargs)))
    return copy.deepcopy(model, memo), Inputs(*given)
