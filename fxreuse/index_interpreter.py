"""The index forms of a graph: what is known of a node, from what is known of its operands.

Values of inputs, parameters and persistent buffers are data and stay unknown (for other buffers see `index_tables`);
so does the result of every operator that is not in the tables of `index_elementwise`, `index_layout` and
`index_series`. What is left is what masks are made of.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import fx

from . import index_elementwise, index_layout, index_series
from .index_bounds import SizeBounds
from .index_call import Call, is_tensor
from .index_elementwise import INTEGERS
from .index_forms import NARROW_LIMIT, Affine, Cases, Unknown, Value
from .index_tables import stored

HANDLERS = {**index_elementwise.HANDLERS, **index_layout.HANDLERS, **index_series.HANDLERS}

#: Operators that may return their input, or part of it, although their schema does not say so.
_HIDDEN_ALIASES = frozenset((torch.ops.aten.type_as, torch.ops.aten.dropout, torch.ops.aten.feature_dropout))


class IndexForms(Mapping[fx.Node, Value]):
    """What an element of each tensor of a graph is, by node, worked out when asked for.

    Nodes may be added to the graph, but none that writes into another's memory; none may be changed.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.bounds = SizeBounds.of(graph)
        self._graph = graph
        self._written = written_tensors(graph)
        self._values: dict[fx.Node, Value] = {}

    def __getitem__(self, node: fx.Node) -> Value:
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [o for o in current.all_input_nodes if o not in self._values and is_tensor(o)]
            if missing and current not in self._values and self._reads(current):
                pending.extend(missing)
                continue
            pending.pop()
            if current not in self._values:
                self._values[current] = self._evaluate(current)
        return self._values[node]

    def __iter__(self) -> Iterator[fx.Node]:
        return (node for node in self._graph.nodes if is_tensor(node))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def written(self, node: fx.Node) -> bool:
        """Whether some operator writes into the memory of a node's tensor."""
        return node in self._written

    def _reads(self, node: fx.Node) -> bool:
        """Whether what is known of a node comes from what is known of its operands."""
        return node not in self._written and _handler(node) is not None

    def _evaluate(self, node: fx.Node) -> Value:
        if node in self._written:
            return Unknown(f"{node.name} is written to in place")
        if node.op != "call_function":
            return stored(node)
        handler = _handler(node)
        if handler is None:
            return Unknown(f"the result of {node.target}")
        dtype = node.meta["val"].dtype
        if dtype is not torch.bool and dtype not in INTEGERS and not dtype.is_floating_point:
            return Unknown(f"elements of {dtype}")
        value = handler(Call.of(node, self._values, self.bounds))
        return _narrow(value) if dtype is torch.int32 else value


def _narrow(value: Value) -> Value:
    """An int32 value, unless its integers are so large that at lengths up to a million they might have wrapped."""
    leaves = [leaf for _, leaf in value.parts] if isinstance(value, Cases) else []
    forms = [leaf for leaf in leaves if isinstance(leaf, Affine)]
    if all(form.bounded(NARROW_LIMIT) == form for form in forms):
        return value
    return Unknown("large integers of 32 bits")


def _handler(node: fx.Node) -> Callable[[Call], Value] | None:
    target = node.target
    return HANDLERS.get(target.overloadpacket) if isinstance(target, torch._ops.OpOverload) else None


def written_tensors(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes whose memory some operator writes into, at any time: what they hold depends on when it is read.

    Two nodes share memory, as far as can be told, if one is a view of the other by the operator's schema, or comes out
    of an operator without a schema (a module, a sub-graph, `getitem`).
    """
    owner: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while owner.setdefault(node, node) is not node:
            owner[node] = owner[owner[node]]
            node = owner[node]
        return node

    written = []
    for node in graph.nodes:
        viewed, overwritten = _effects(node)
        written += overwritten
        for source in viewed:
            owner[find(node)] = find(source)
    roots = {find(node) for node in written}
    return frozenset(node for node in graph.nodes if find(node) in roots) if roots else frozenset()


def _effects(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The inputs that a node's result may share memory with, and those that it writes into."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        shares = node.op == "call_module" or (node.op == "call_function" and not _is_size_arithmetic(node))
        return (node.all_input_nodes if shares else []), []
    if target.overloadpacket in _HIDDEN_ALIASES:
        return node.all_input_nodes, []
    viewed: list[fx.Node] = []
    written: list[fx.Node] = []
    given = {argument.name: value for argument, value in zip(target._schema.arguments, node.args, strict=False)}
    given.update(node.kwargs)
    for argument in target._schema.arguments:
        if argument.alias_info is not None and argument.name in given:
            nodes: list[fx.Node] = []
            fx.node.map_arg(given[argument.name], nodes.append)
            viewed += nodes
            written += nodes if argument.alias_info.is_write else []
    return viewed, written


def _is_size_arithmetic(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymBool, torch.SymFloat)) and (
        node.target is not operator.getitem
    )
