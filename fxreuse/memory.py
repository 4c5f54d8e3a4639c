"""Memory that operators write into: which nodes share it, in which order they have to touch it, and who reads it."""

from __future__ import annotations

import operator

import torch
from torch import fx

_aten = torch.ops.aten

#: Operators that may return their input, or part of it, although their schema does not say so.
_HIDDEN_ALIASES = frozenset({
    _aten.type_as, _aten.dropout, _aten.feature_dropout, _aten.alpha_dropout, _aten.feature_alpha_dropout, _aten.einsum,
    _aten.meshgrid, _aten.broadcast_tensors, _aten.atleast_1d, _aten.atleast_2d, _aten.atleast_3d,
})  # fmt: skip


def written_tensors(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes whose memory some operator writes into, at any time: what they hold depends on when it is read.

    Two nodes share memory, as far as can be told, if one is a view of the other by the operator's schema, or comes out
    of an operator without a schema (a module, a sub-graph, `getitem`).
    """
    return frozenset(_written_memory(graph))


def memory_order(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """What each node has to come after, beside its operands, because of the memory that it reads or writes.

    Who reads comes after the last write; who writes comes after the last write and all that read since.
    """
    memory = _written_memory(graph)
    order: dict[fx.Node, list[fx.Node]] = {}
    writer: dict[fx.Node, fx.Node] = {}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes if memory else ():
        touched = {memory[other] for other in (node, *node.all_input_nodes) if other in memory}
        written = {memory[other] for other in _effects(node)[1]}
        for root in touched:
            before = [writer[root]] if root in writer else []
            if root in written:
                before += readers.pop(root, [])
                writer[root] = node
            else:
                readers.setdefault(root, []).append(node)
            order.setdefault(node, []).extend(before)
    return {node: before for node, before in order.items() if before}


def idle_memory(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of all memory that the graph makes itself, writes into, and does not read, in order."""
    memory = _written_memory(graph)
    read = {root for node, root in memory.items() if not isinstance(node.target, torch._ops.OpOverload)}
    for node in graph.nodes if memory else ():
        own = memory.get(node)
        read.update(memory[other] for other in node.all_input_nodes if other in memory and memory[other] is not own)
    return [node for node, root in memory.items() if root not in read]


def _written_memory(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The nodes whose memory is written into, with one of the nodes that share it, the same for all of them."""
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
    return {node: find(node) for node in graph.nodes if find(node) in roots} if roots else {}


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
