"""Every node that a program executes, with the values that it works on told apart: through outlined layers as well.

An outlined layer is a submodule with a graph of its own. The walk steps into it, so that a cost is read where the
work is done, and carries the identity of values across its boundary, so that a layer that is handed its leader's
query and key is seen to work on the same ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from ..program import get_attribute
from .aliasing import shared_operand
from .macs import REGIONS
from .sizes import operands, operator_name, shape

#: Operators that only rearrange a tensor, or scale it, or widen it with zeros: scores made from it stay the same.
_REARRANGING = frozenset({
    "view", "reshape", "_unsafe_view", "transpose", "permute", "t", "mT", "numpy_T", "matrix_H", "contiguous",
    "clone", "unsqueeze", "squeeze", "expand", "expand_as", "flatten", "unflatten", "alias", "detach", "movedim",
    "swapaxes", "swapdims", "to", "type_as", "_to_copy", "dropout", "pad", "constant_pad_nd", "mul", "div",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Value:
    """The identity of a value: two values with one ``number`` are computed alike; ``source`` is what it rearranges.

    ``storage`` is the memory that it is in, which is shared by views.
    """

    number: int
    source: int
    storage: int = dataclasses.field(default=-1, repr=False, compare=False)


# What a graph gives back: values in the structure of its output.
Values = Any


@dataclasses.dataclass(frozen=True)
class Step:
    """One node that is executed, the path of the outlined layer it is in, and the values of that layer so far.

    ``leaf`` is the module that a ``call_module`` node calls, where no graph of its own shows its work. ``tensors`` are
    the parameters, buffers and constants that a ``get_attr`` node or a leaf reads, by their storage.
    """

    node: fx.Node
    path: str
    values: Mapping[fx.Node, Values]
    leaf: torch.nn.Module | None = None
    tensors: Mapping[int, torch.Tensor] = dataclasses.field(default_factory=dict)


def walk(module: torch.nn.Module) -> list[Step]:
    """The nodes that a graph module executes, in order, those of outlined layers once per call.

    Raises:
        UnsupportedError: for a call of a module whose work no graph shows.
    """
    walker = _Walker()
    walker.run(module, [walker.fresh() for _ in graph_of(module).find_nodes(op="placeholder")], "")
    return walker.steps


def graph_of(module: torch.nn.Module) -> fx.Graph:
    """The graph that a module runs."""
    graph = module.graph
    assert isinstance(graph, fx.Graph)
    return graph


class _Walker:
    """The steps so far, and the numbers that values and storages have."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._numbers: dict[Hashable, int] = {}
        self._storages = itertools.count()
        self._held: dict[int, int] = {}
        self._tuples: set[int] = set()

    def fresh(self) -> Value:
        """A value like no other."""
        return self._numbered(object())

    def _numbered(self, key: Hashable) -> Value:
        number = self._numbers.setdefault(key, len(self._numbers))
        return Value(number, number, next(self._storages))

    def run(self, module: torch.nn.Module, inputs: Iterable[Values], path: str) -> Values:
        """Walk a module's graph on these inputs. Returns the values of its output."""
        values: dict[fx.Node, Values] = {}
        given = iter(inputs)
        for node in graph_of(module).nodes:
            if node.op == "output":
                return _values_of(node.args[0], values)
            values[node] = next(given) if node.op == "placeholder" else self._value(module, node, values, path)
            self.steps.append(Step(node, path, values, _leaf(module, node), self._tensors(module, node)))
        return None

    def _value(self, module: torch.nn.Module, node: fx.Node, values: dict[fx.Node, Values], path: str) -> Values:
        if node.op == "get_attr":
            held = get_attribute(module, str(node.target))
            value = self._numbered(("attribute", id(held)))
            return dataclasses.replace(value, storage=self._held.setdefault(id(held), value.storage))
        if node.op == "call_module":
            inner = module.get_submodule(str(node.target))
            if isinstance(getattr(inner, "graph", None), fx.Graph):
                inputs = _inputs(graph_of(inner), node)
                return self.run(inner, _values_of(inputs, values), f"{path}.{node.target}".removeprefix("."))
            return self._placed(self.fresh(), node, inner, values)
        if operator_name(node) in REGIONS:
            region, inputs = _region(module, node)
            return self.run(region, _values_of(inputs, values), path)
        if node.target is operator.getitem:
            whole, index = _values_of(node.args, values)
            if isinstance(whole, (tuple, list, dict)):
                return whole[index]
            value = self._computed(node, values)
            place = whole.storage + 1 + index if whole.storage in self._tuples else whole.storage
            return dataclasses.replace(value, storage=place)
        return self._placed(self._computed(node, values), node, None, values)

    def _computed(self, node: fx.Node, values: dict[fx.Node, Values]) -> Value:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            result = self.fresh()
        else:
            result = self._numbered((str(node.target), repr(_values_of((node.args, node.kwargs), values))))
        if _rearranges(node) and isinstance(first := _values_of(node.args[0], values), Value):
            return dataclasses.replace(result, source=first.source)
        return result

    def _placed(
        self, value: Value, node: fx.Node, leaf: torch.nn.Module | None, values: dict[fx.Node, Values]
    ) -> Value:
        """The value in the storage that it shares, or else in one of its own, with as many more as it has parts."""
        shared = shared_operand(node, leaf)
        if shared is not None and isinstance(whole := values[shared], Value):
            return dataclasses.replace(value, storage=whole.storage)
        if isinstance(found := node.meta.get("val"), (tuple, list)):
            self._tuples.add(value.storage)
            for _ in found:
                next(self._storages)
        return value

    def _tensors(self, module: torch.nn.Module, node: fx.Node) -> dict[int, torch.Tensor]:
        """The parameters, buffers and constants that a node reads by itself, by storage."""
        if node.op == "get_attr":
            found = get_attribute(module, str(node.target))
            tensors = [found] if isinstance(found, torch.Tensor) else []
        elif (leaf := _leaf(module, node)) is not None:
            tensors = [*leaf.parameters(), *leaf.buffers()]
        else:
            return {}
        return {self._held.setdefault(id(held), next(self._storages)): held for held in tensors}


def _values_of(argument: Any, values: Mapping[fx.Node, Values]) -> Values:
    """An argument with every node in it replaced by its value."""
    return fx.node.map_arg(argument, lambda node: values[node])


def _inputs(inner: fx.Graph, node: fx.Node) -> list[Any]:
    """The arguments of a call in the order of the inner graph's placeholders."""
    names = [str(placeholder.target) for placeholder in inner.find_nodes(op="placeholder")]
    return [*node.args, *(node.kwargs.get(name) for name in names[len(node.args) :])]


def _region(module: torch.nn.Module, node: fx.Node) -> tuple[torch.nn.Module, list[Any]]:
    """The graph module that a higher-order operator runs, and the operands that it runs it on."""
    for place, argument in enumerate(node.args):
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            inner = get_attribute(module, str(argument.target))
            if isinstance(inner, torch.nn.Module):
                return inner, list(node.args[place + 1 :])
    raise AssertionError(f"{node.name} runs no graph")


def _rearranges(node: fx.Node) -> bool:
    """Whether the result is its first operand rearranged, scaled by a number, or widened with zeros."""
    library, _, name = operator_name(node).partition(".")
    if library != "aten" or name not in _REARRANGING:
        return False
    first, *others = operands(node)
    if name in ("mul", "div"):
        return not isinstance(others[0], fx.Node)
    return "pad" not in name or shape(node)[:-1] == shape(first)[:-1]


def _leaf(module: torch.nn.Module, node: fx.Node) -> torch.nn.Module | None:
    """The module that a node calls, where it has no graph to walk."""
    if node.op != "call_module":
        return None
    inner = module.get_submodule(str(node.target))
    return None if isinstance(getattr(inner, "graph", None), fx.Graph) else inner
