"""Emission: a flat program becomes a module with the original's tree, its layers outlined at their original paths."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Iterable, Mapping

import torch
from torch import fx

from ..program import Program
from ..record import Note, Record
from .containers import class_name, container_for
from .outline import Region, find_regions, is_size, rebuild_size, schedule, size_sources
from .rewritten import Layer, Rewritten

_SIZE = torch.ops.aten.sym_size.int


def emit(program: Program, record: Record, layer_paths: Iterable[str], modes: dict[str, bool]) -> Rewritten:
    """Make the module that a user gets.

    Arguments:
        program: the program after all passes.
        record: what was done; notes on layers that stayed flat are added to it.
        layer_paths: the module calls to outline.
        modes: train or eval mode of the original's modules, by path; a new module takes that of its nearest owner.
    """
    regions, refused = find_regions(program.graph, layer_paths)
    order = schedule(program.graph, regions)
    while isinstance(order, Region):
        regions.remove(order)
        refused[order.path] = "it and another layer need each other's values"
        order = schedule(program.graph, regions)
    notes = [Note("outline", path, f"stays in the outer graph: {reason}") for path, reason in refused.items()]
    notes += _lost_layerdrop(program, regions)
    names = _names(program, regions)
    outer, layers = _cut(program, order, names)
    root = Rewritten(
        outer,
        program.name,
        program.call,
        program.guards,
        dataclasses.replace(record, notes=(*record.notes, *program.notes, *notes)),
    )
    _grow(root, "", program.module, program, layers)
    for path, layer in layers.items():
        if "@" in path:
            _hang(root, path, layer)
    _share_repeated_modules(root, layers)
    _set_modes(root, modes)
    return root


def _lost_layerdrop(program: Program, regions: list[Region]) -> list[Note]:
    """A note on every layer that the original skips at random and the result cannot."""
    gates = {region.path for region in regions if region.can_be_skipped}
    remedy = "set the model's LayerDrop to 0, or keep the Python around its layers with target="
    lost = [(path, p) for path, p in program.layerdrop.items() if p > 0 and path not in gates]
    return [Note("training", path, f"LayerDrop ({p:g}) never skips this layer", remedy) for path, p in lost]


def _names(program: Program, regions: list[Region]) -> dict[str, str]:
    """Region path → path in the result: ``a.b@0``, ``a.b@1`` … for a module that is called several times."""
    repeated = {region.base for region in regions if "@" in region.path}
    return {r.path: f"{r.base}@0" if r.path in repeated else r.path for r in regions}


def _cut(program: Program, order: list[fx.Node | Region], names: dict[str, str]) -> tuple[fx.Graph, dict[str, Layer]]:
    outer = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    layers: dict[str, Layer] = {}
    for item in order:
        if isinstance(item, fx.Node):
            values[item] = outer.node_copy(item, lambda node: values[node])
            continue
        path = names[item.path]
        graph, reads = _layer_graph(item, own_parameters="@" not in path)
        skipped = program.layerdrop.get(item.path) if item.can_be_skipped else None
        layers[path] = Layer(graph, _class_name(program, item.base), skipped)
        made = outer.call_module(path, tuple(values[node] for node in reads))
        made.meta["nn_module_stack"] = copy.copy(item.outputs[0].meta.get("nn_module_stack", {}))
        results = [node.meta["val"] for node in item.outputs]
        made.meta["val"] = results[0] if len(results) == 1 else tuple(results)
        for index, node in enumerate(item.outputs):
            values[node] = made if len(item.outputs) == 1 else outer.call_function(operator.getitem, (made, index))
            values[node].meta.update({key: value for key, value in node.meta.items() if key in ("val", "stack_trace")})
    for node in outer.find_nodes(op="get_attr"):
        if not node.users:
            outer.erase_node(node)
    return outer, layers


def _layer_graph(region: Region, own_parameters: bool) -> tuple[fx.Graph, list[fx.Node]]:
    """The graph of a layer, and the outer nodes that it is called with."""
    graph = fx.Graph()
    prefix = f"{region.base}."
    inside = set(region.nodes)
    owned = {
        node
        for node in region.inputs
        if own_parameters
        and node.op == "get_attr"
        and str(node.target).startswith(prefix)
        and inside.issuperset(node.users)
    }
    sources = size_sources(node for node in region.inputs if node not in owned)
    tensors = [node for node in region.inputs if node not in owned and not is_size(node)]
    sizes = [node for node in region.inputs if is_size(node)]
    values: dict[fx.Node, fx.Node] = {}
    reads = [*tensors, *(node for node in sizes if not rebuild_size(node, sources))]
    for index, node in enumerate(reads):
        made = graph.placeholder("hidden_states" if index == 0 else node.name)
        made.meta = copy.copy(node.meta)
        values[node] = made
    for node in sizes:
        _size(graph, node, sources, values)
    for node in owned:
        values[node] = graph.get_attr(str(node.target)[len(prefix) :])
        values[node].meta = copy.copy(node.meta)
    for node in region.nodes:
        made = graph.node_copy(node, lambda old: values[old])
        if node.op == "call_module":
            made.target = str(node.target).removeprefix(prefix)
        values[node] = made
    outputs = tuple(values[node] for node in region.outputs)
    graph.output(outputs[0] if len(outputs) == 1 else outputs)
    return graph, reads


def _size(
    graph: fx.Graph, node: fx.Node, sources: Mapping[str, tuple[fx.Node, int]], values: dict[fx.Node, fx.Node]
) -> fx.Node:
    """A size inside a layer: read off a tensor that the layer is given, or computed as in the outer graph."""
    if node not in values:
        source = sources.get(str(node.meta["val"].node.expr))
        if source is not None:
            values[node] = graph.call_function(_SIZE, (values[source[0]], source[1]))
            values[node].meta = copy.copy(node.meta)
        else:
            values[node] = graph.node_copy(node, lambda argument: _size(graph, argument, sources, values))
    return values[node]


def _class_name(program: Program, path: str) -> str:
    original = program.originals.get(path)
    return class_name(original) if original is not None else "Layer"


def _grow(
    here: torch.nn.Module,
    path: str,
    source: torch.nn.Module,
    program: Program,
    layers: dict[str, Layer],
) -> None:
    """Fill a module with the parameters, buffers and children of the program's tree at that path."""
    for name, parameter in source._parameters.items():
        here.register_parameter(name, parameter)
    for name, buffer in source._buffers.items():
        full = f"{path}.{name}" if path else name
        here.register_buffer(name, buffer, persistent=full not in program.non_persistent)
    for name, value in source.__dict__.items():
        if isinstance(value, torch.Tensor):
            here.__dict__[name] = value
    for name, child in source._modules.items():
        full = f"{path}.{name}" if path else name
        if child is None:
            continue
        if type(child) is not torch.nn.Module:
            made: torch.nn.Module = child
        else:
            holds_calls = any(layer.rpartition(".")[0] == full and "@" in layer for layer in layers)
            made = layers[full] if full in layers else container_for(program.originals.get(full), plain=holds_calls)
            _grow(made, full, child, program, layers)
        here.add_module(name, made)


def _hang(root: torch.nn.Module, path: str, layer: Layer) -> None:
    """Put a layer of a module that is called several times beside that module."""
    owner, _, name = path.rpartition(".")
    root.get_submodule(owner).add_module(name, layer)


def _share_repeated_modules(root: torch.nn.Module, layers: dict[str, Layer]) -> None:
    """A layer ``a.b@1`` gets copies of the mode-dependent modules that it calls, at the same relative paths."""
    for path, layer in layers.items():
        if "@" not in path:
            continue
        base = path.partition("@")[0]
        for node in layer.graph.find_nodes(op="call_module"):
            owner: torch.nn.Module = layer
            *parts, name = str(node.target).split(".")
            for part in parts:
                if part not in owner._modules:
                    owner.add_module(part, container_for(None))
                owner = owner.get_submodule(part)
            owner.add_module(name, copy.copy(root.get_submodule(f"{base}.{node.target}")))


def _set_modes(root: torch.nn.Module, modes: dict[str, bool]) -> None:
    for path, module in root.named_modules():
        known = path.partition("@")[0]
        while known and known not in modes:
            known = known.rpartition(".")[0]
        module.training = modes.get(known, modes[""])
