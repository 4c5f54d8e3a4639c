"""Outlining: cut a flat graph into the layers of its stacks, each a graph of its own, and an outer one that calls them.

A region is the set of nodes of one layer call. It can be cut out where it is convex: nothing outside depends on it and
feeds it. What several layers share and no hidden state feeds (relative position tables, masks) stays outside. Who reads
memory that is written into depends on who writes, as on an operand.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Mapping

import torch
from torch import fx

from ..memory import memory_order
from ..program import fixed_size, module_stack

_Order = Mapping[fx.Node, list[fx.Node]]


@dataclasses.dataclass(eq=False)
class Region:
    """The nodes of one layer call, and the names they are called by outside.

    ``path`` is the module call, ``nodes`` are in graph order, ``inputs`` and ``outputs`` have the hidden states first.
    ``can_be_skipped`` says that the hidden states going in could stand for what comes out, as LayerDrop has it.
    """

    path: str
    nodes: list[fx.Node]
    inputs: list[fx.Node] = dataclasses.field(default_factory=list)
    outputs: list[fx.Node] = dataclasses.field(default_factory=list)
    can_be_skipped: bool = False

    @property
    def base(self) -> str:
        """The module's path without the number of the call."""
        return self.path.partition("@")[0]


def find_regions(graph: fx.Graph, layer_paths: Iterable[str]) -> tuple[list[Region], dict[str, str]]:
    """The regions of the layers that can be cut out, and for the others the reason by path."""
    wanted = list(dict.fromkeys(layer_paths))
    regions = _collect(graph, set(wanted))
    order = memory_order(graph)
    _hoist_shared(graph, regions, order)
    refused: dict[str, str] = {path: "no nodes of its own" for path in wanted if path not in regions}
    kept: list[Region] = []
    for path in wanted:
        region = regions.get(path)
        if region is None or not region.nodes:
            refused.setdefault(path, "no nodes of its own")
            continue
        foreign = _foreign_module(region)
        if foreign is not None:
            refused[path] = f"it calls {foreign}, which is not part of it"
            continue
        between = _between(region, order)
        if between is not None:
            refused[path] = f"{between.name}, which is outside of it, depends on it and feeds it"
            continue
        kept.append(region)
    for region in kept:
        _set_interface(region)
    usable = [region for region in kept if region.inputs and region.outputs]
    refused |= {region.path: "no hidden state goes in or comes out" for region in kept if region not in usable}
    return usable, refused


def layer_nodes(graph: fx.Graph, layer_paths: Iterable[str]) -> dict[str, list[fx.Node]]:
    """The nodes of each layer call, in graph order, without what several layers read and no input's values feed."""
    wanted = list(dict.fromkeys(layer_paths))
    regions = _collect(graph, set(wanted))
    _hoist_shared(graph, regions, memory_order(graph))
    return {path: regions[path].nodes if path in regions else [] for path in wanted}


def _collect(graph: fx.Graph, wanted: set[str]) -> dict[str, Region]:
    regions: dict[str, Region] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "call_module"):
            continue
        path = next((path for path in module_stack(node) if path in wanted), None)
        if path is not None:
            regions.setdefault(path, Region(path, [])).nodes.append(node)
    return regions


def _hoist_shared(graph: fx.Graph, regions: dict[str, Region], order: _Order) -> None:
    """Take out of the regions what several of them read and no input's values feed."""
    owner = {node: region for region in regions.values() for node in region.nodes}
    fed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta["val"], torch.Tensor):
            fed.add(node)
            continue
        is_size = isinstance(node.meta.get("val"), (torch.SymInt, int, torch.device, torch.dtype))
        if not is_size and any(argument in fed for argument in _needs(node, order)):
            fed.add(node)
    shared = [
        node
        for node, region in owner.items()
        if node not in fed and any(owner.get(user) is not region for user in node.users)
    ]
    while shared:
        node = shared.pop()
        if node in owner:
            owner.pop(node).nodes.remove(node)
            shared.extend(argument for argument in _needs(node, order) if argument in owner)


def _foreign_module(region: Region) -> str | None:
    """A module that a region calls and that lies elsewhere in the tree."""
    called = (str(node.target) for node in region.nodes if node.op == "call_module")
    return next((path for path in called if not path.startswith(f"{region.base}.")), None)


def _between(region: Region, order: _Order) -> fx.Node | None:
    """A node outside the region that depends on it and feeds it."""
    inside = set(region.nodes)
    last = region.nodes[-1]
    after: dict[fx.Node, list[fx.Node]] = {}
    for node, before in order.items():
        for earlier in before:
            after.setdefault(earlier, []).append(node)

    def dependents(node: fx.Node) -> list[fx.Node]:
        return [*node.users, *after.get(node, ())]

    reached: set[fx.Node] = set()
    frontier = [user for node in region.nodes for user in dependents(node) if user not in inside]
    while frontier:
        node = frontier.pop()
        if node in reached or last < node:
            continue
        reached.add(node)
        for user in dependents(node):
            if user in inside:
                return node
            frontier.append(user)
    return None


def _needs(node: fx.Node, order: _Order) -> list[fx.Node]:
    """What has to be computed before a node."""
    return [*node.all_input_nodes, *order.get(node, ())]


def _set_interface(region: Region) -> None:
    inside = set(region.nodes)
    read = dict.fromkeys(
        argument for node in region.nodes for argument in node.all_input_nodes if argument not in inside
    )
    outputs = [node for node in region.nodes if any(user not in inside for user in node.users)]
    tensors = [node for node in outputs if isinstance(node.meta["val"], torch.Tensor)]
    if not tensors:
        return
    hidden_out = tensors[-1]
    region.outputs = [hidden_out, *(node for node in outputs if node is not hidden_out)]
    hidden_in, only = _hidden_input(list(read), hidden_out)
    region.can_be_skipped = only and len(region.outputs) == 1
    if hidden_in is not None:
        region.inputs = [hidden_in, *(node for node in read if node is not hidden_in)]


def _hidden_input(read: list[fx.Node], hidden_out: fx.Node) -> tuple[fx.Node | None, bool]:
    """Among what a region reads, the activation of the outgoing hidden states' shape that was computed last.

    Returns it, and whether it is the only one of that shape.
    """
    shape = [str(size) for size in hidden_out.meta["val"].shape]
    activations = [
        node
        for node in read
        if node.op != "get_attr"
        and isinstance(node.meta["val"], torch.Tensor)
        and node.meta["val"].dtype == hidden_out.meta["val"].dtype
    ]
    same = [node for node in activations if [str(size) for size in node.meta["val"].shape] == shape]
    candidates = same or activations
    return (max(candidates) if candidates else None), len(same) == 1


def schedule(graph: fx.Graph, regions: list[Region]) -> list[fx.Node | Region] | Region:
    """The outer graph's order: single nodes and regions, each after what it reads, otherwise as in the graph.

    Where two regions need each other, one of them is returned instead: it has to stay flat.
    """
    unit: dict[fx.Node, fx.Node | Region] = {node: region for region in regions for node in region.nodes}
    position = {node: index for index, node in enumerate(graph.nodes)}
    memory = memory_order(graph)
    units: list[fx.Node | Region] = list(dict.fromkeys(unit.get(node, node) for node in graph.nodes))
    rank = {id(item): position[item.nodes[0] if isinstance(item, Region) else item] for item in units}
    waiting: dict[int, set[int]] = {}
    readers: dict[int, list[fx.Node | Region]] = {}
    for item in units:
        nodes = item.nodes if isinstance(item, Region) else [item]
        needs = {id(unit.get(a, a)): unit.get(a, a) for node in nodes for a in _needs(node, memory)}
        needs.pop(id(item), None)
        waiting[id(item)] = set(needs)
        for needed in needs.values():
            readers.setdefault(id(needed), []).append(item)
    ready = [(rank[id(item)], index) for index, item in enumerate(units) if not waiting[id(item)]]
    heapq.heapify(ready)
    index_of = {id(item): index for index, item in enumerate(units)}
    order: list[fx.Node | Region] = []
    while ready:
        item = units[heapq.heappop(ready)[1]]
        order.append(item)
        for reader in readers.get(id(item), ()):
            waiting[id(reader)].discard(id(item))
            if not waiting[id(reader)]:
                heapq.heappush(ready, (rank[id(reader)], index_of[id(reader)]))
    if len(order) < len(units):
        return next(item for item in reversed(units) if isinstance(item, Region) and waiting[id(item)])
    return order


def rebuild_size(node: fx.Node, sources: Mapping[str, tuple[fx.Node, int]]) -> bool:
    """Whether a size can be computed inside a layer, from the sizes of the tensors that it is given."""
    if str(node.meta["val"].node.expr) in sources:
        return True
    if node.op != "call_function" or node.target is torch.ops.aten.sym_size.int:
        return False
    return all(is_size(argument) and rebuild_size(argument, sources) for argument in node.all_input_nodes)


def is_size(node: fx.Node) -> bool:
    """Whether a node's value is a size that is not a number."""
    return isinstance(node.meta.get("val"), torch.SymInt)


def size_sources(inputs: Iterable[fx.Node]) -> Mapping[str, tuple[fx.Node, int]]:
    """Where a layer can read a size: the symbolic expression → (tensor input, dimension)."""
    sources: dict[str, tuple[fx.Node, int]] = {}
    for node in inputs:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and fixed_size(size) is None:
                    sources.setdefault(str(size.node.expr), (node, dim))
    return sources
