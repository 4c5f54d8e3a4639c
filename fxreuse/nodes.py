"""Making and removing nodes of a program's graph, with ``meta`` filled as capture fills it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

from .memory import idle_memory

# By graph, the values of calls by operator and arguments: layers repeat, and what free sizes give takes long to infer.
_values: weakref.WeakKeyDictionary[fx.Graph, dict[Hashable, Any]] = weakref.WeakKeyDictionary()

# Operators whose absence can be noticed although nobody reads their result.
_MUTATING = {torch.ops.aten.copy_.default, torch.ops.aten.set_.default}


@contextlib.contextmanager
def inserting_before(node: fx.Node) -> Iterator[Callable[..., fx.Node]]:
    """A function that makes a call node before ``node``, with ``meta`` from ``node`` and the value computed.

    ``insert(target, *args, **kwargs)`` calls an operator, or a submodule where the target is a string.
    """

    def insert(target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        return call(node.graph, target, args, kwargs, like=node)

    with node.graph.inserting_before(node):
        yield insert


def call(
    graph: fx.Graph, target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node
) -> fx.Node:
    """A new call node at the graph's insertion point, with names and lines of ``like`` and its own ``meta["val"]``."""
    if isinstance(target, str):
        assert graph.owning_module is not None
        made = graph.call_module(target, args, kwargs)
        value = evaluate(graph.owning_module.get_submodule(target), args, kwargs)
    else:
        made = graph.call_function(target, args, kwargs)
        value = _known_value(graph, target, args, kwargs)
    for key in ("nn_module_stack", "stack_trace"):
        if key in like.meta:
            made.meta[key] = like.meta[key]
    made.meta["val"] = value
    return made


def _known_value(graph: fx.Graph, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The value of a call, from the last call of the same operator over like values where there was one."""
    if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
        return evaluate(target, args, kwargs)
    try:
        key = (target, _form(args), _form(tuple(kwargs.items())))
    except _Formless:
        return evaluate(target, args, kwargs)
    known = _values.setdefault(graph, {})
    if key not in known:
        known[key] = evaluate(target, args, kwargs)
    return known[key]


class _Formless(Exception):
    """An argument that has no `_form`."""


def _form(value: Any) -> Hashable:
    """What decides the value of a call about one of its arguments: of a tensor, all but its elements."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_form, value))
    if isinstance(value, FakeTensor) and value.constant is None:
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        return (value.ndim, *map(_form, sizes), value.dtype, value.device, value.requires_grad)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return (type(value), value.node.expr)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.memory_format)):
        return (type(value), value)
    raise _Formless


def evaluate(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The value of a call over the values of its arguments: with fake tensors, nothing is computed.

    Sizes that are free stay free: the kernels of some composite operators (``pad``) would take their numbers, but not
    their forms in Python.
    """
    values = map_nodes((args, kwargs), lambda node: node.meta["val"])
    found: list[Any] = []
    map_nodes((args, kwargs), lambda node: found.append(node.meta["val"]))
    mode = detect_fake_mode([value for value in found if isinstance(value, torch.Tensor)])
    with mode or contextlib.nullcontext(), enable_python_dispatcher(), torch.enable_grad():
        return function(*values[0], **values[1])


def map_nodes(value: Any, function: Callable[[fx.Node], Any]) -> Any:
    """The same structure with a function applied to every node in it."""
    return fx.node.map_arg(value, function)


def share_values(graph: fx.Graph, copy: fx.Graph) -> None:
    """Let what is known of the values of calls in one graph be known of those in a copy, and the other way round."""
    _values[copy] = _values.setdefault(graph, {})


def replace(node: fx.Node, new: fx.Node) -> None:
    """Every reader of ``node`` reads ``new``, and ``node`` is gone."""
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def is_effect(node: fx.Node) -> bool:
    """Whether a node must stay although nobody reads it: it writes to a tensor that others see."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function":
        return False
    if node.target in _MUTATING:
        return True
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def remove_dead(graph: fx.Graph) -> int:
    """Erase the nodes that nobody reads and that write nothing, random draws and assertions among them.

    What is written counts where somebody reads it: memory that the graph makes, fills and leaves goes as a whole.

    Returns how many were erased.
    """
    before = len(graph.nodes)
    idle: list[fx.Node] = []
    while True:
        for node in reversed(idle):
            graph.erase_node(node)
        writes = False
        for node in reversed(list(graph.nodes)):
            if node.op in ("placeholder", "output"):
                continue
            if is_effect(node):
                writes = True
            elif not node.users:
                graph.erase_node(node)
        idle = idle_memory(graph) if writes else []
        if not idle:
            return before - len(graph.nodes)


def is_call(node: Any, *targets: Callable[..., Any]) -> bool:
    """Whether a value is a node that calls one of these operators."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call node, however it was passed."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)
