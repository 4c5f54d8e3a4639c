"""A graph as plain data and back, for pickling. Names, targets and arguments are kept; ``meta`` is not."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from ..errors import FxReuseError
from ..nodes import map_nodes


@dataclasses.dataclass(frozen=True)
class _Reference:
    """Stands for a node in the arguments of another."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Operator:
    """Stands for an operator overload, ``aten.add.Tensor``."""

    name: str


def encode(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The nodes of a graph as picklable tuples, in order."""
    rows = []
    for node in graph.nodes:
        args, kwargs = map_nodes((node.args, node.kwargs), lambda argument: _Reference(argument.name))
        target = _Operator(str(node.target)) if isinstance(node.target, torch._ops.OpOverload) else node.target
        rows.append((node.name, node.op, target, _plain(args), _plain(kwargs)))
    return rows


def _plain(value: Any) -> Any:
    """The same structure without fx's immutable containers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return slice(_plain(value.start), _plain(value.stop), _plain(value.step)) if isinstance(value, slice) else value


def decode(rows: list[tuple[Any, ...]]) -> fx.Graph:
    """The graph that `encode` took apart."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for name, op, target, args, kwargs in rows:
        if isinstance(target, _Operator):
            target = _operator(target.name)
        args, kwargs = fx.node.map_aggregate(
            (args, kwargs), lambda value: nodes[value.name] if isinstance(value, _Reference) else value
        )
        nodes[name] = graph.create_node(op, target, tuple(args), dict(kwargs), name=name)
    return graph


def _operator(name: str) -> torch._ops.OpOverload:
    namespace, packet, overload = name.split(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except AttributeError:
        raise FxReuseError(
            f"the saved graph calls the operator {name}, which this process does not have; "
            "import the library that registers it before loading"
        ) from None
