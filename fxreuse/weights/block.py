"""The repeated block of a stack: which projection of one layer corresponds to which of another.

Names play no part. Every node of a layer gets a colour, from its operator and from whether it makes queries, keys or
values of which attention; then, round by round, a new one from the colours of what it reads and of what reads it
(Weisfeiler and Leman's refinement). Nodes that keep one colour over all rounds have the same place in isomorphic
layers. Where layers differ in part (one has a shifted window, or makes a bias that all use), the last round is taken in
which their projections have the same colours.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..attention import AttentionSite, AttentionSites
from ..emission.outline import layer_nodes
from ..errors import UnsupportedError
from ..finding.contractions import contraction, is_convolution
from ..finding.follow import aten, packet
from ..layouts.projections import Projection, is_parameter, read_projection
from ..program import Program
from .parts import Part, operands_of, parts_of

_ROUNDS = 64
#: Operators of which there are several at one place, told apart by their arguments.
_PIECES = frozenset({"getitem", aten.slice, aten.select, aten.narrow})


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """One place of the block: by layer, the node that has the projection's result, its parameters, its matrices."""

    nodes: tuple[str, ...]
    weights: tuple[str, ...]
    biases: tuple[str | None, ...]
    parts: tuple[tuple[Part, ...], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """The layers of a stack, as the module calls that they are, and the places of their projections in order."""

    stack: str
    layers: tuple[str, ...]
    places: tuple[Place, ...]


def find_block(program: Program, sites: AttentionSites, stack: str, convolutions: bool = False) -> Block:
    """The block that a stack repeats.

    All projections of the layers take part: products of a value with a matrix of parameters, whatever operator they are
    written with, but for convolutions (see `projections_of`) and for what is made of queries and keys before the map.

    Arguments:
        program: a normalised program, before any pass that makes layers differ.
        sites: its attentions.
        stack: the name of one of its stacks.
        convolutions: whether convolutions over one position take part.

    Raises:
        UnsupportedError: where the layers are no module calls of their own, or have other projections from one another.
    """
    layers = tuple(site.layer_path for site in sites.stacks[stack])
    if len(set(layers)) < len(layers) or "" in layers:
        raise UnsupportedError(
            f"the layers of stack {stack} are no module calls of their own, so that what belongs to each is not known; "
            "write each layer as a torch.nn.Module."
        )
    nodes = layer_nodes(program.graph, layers)
    own = {layer: [site for site in sites if site.layer_path == layer] for layer in layers}
    found = {layer: projections_of(program, nodes[layer], own[layer], convolutions) for layer in layers}
    tags = [_tags(own[layer]) for layer in layers]
    colours = _colours(program, [nodes[layer] for layer in layers], tags, [found[layer] for layer in layers])
    order = _aligned(layers, colours)
    operands = {layer: operands_of(program, own[layer]) for layer in layers}
    places = []
    for indices in order:
        here = [found[layer][index] for layer, index in zip(layers, indices, strict=True)]
        parts = [parts_of(program, one, operands[layer]) for layer, one in zip(layers, here, strict=True)]
        names = tuple(one.result.name for one in here)
        weights, biases = tuple(one.weight for one in here), tuple(one.bias for one in here)
        places.append(Place(names, weights, biases, tuple(parts)))
    return Block(stack, layers, tuple(places))


def projections_of(
    program: Program, nodes: Iterable[fx.Node], sites: Iterable[AttentionSite], convolutions: bool = False
) -> list[Projection]:
    """The projections among the nodes of a layer, in order; those that are part of making a map are left out.

    With ``convolutions`` those over one position (kernel and stride 1, no padding, one group) are among them, which
    project the channels of each position; wider ones never are.
    """
    nodes = list(nodes)
    excluded = set().union(*(_between(nodes, site) for site in sites))
    found: dict[fx.Node, Projection] = {}
    for node in nodes:
        if node in excluded or (is_convolution(node) and not (convolutions and contraction(node))):
            continue
        projection = read_projection(program, node)
        if projection is not None and projection.node not in excluded:
            found[projection.node] = projection
    return list(found.values())


def _between(nodes: Sequence[fx.Node], site: AttentionSite) -> set[fx.Node]:
    """What is made of the queries and keys of an attention before its map."""
    operands = {site.nodes.query, site.nodes.key}
    made: set[fx.Node] = set()
    for node in nodes:
        if node.name == site.nodes.map:
            break
        if any(operand in made or operand.name in operands for operand in node.all_input_nodes):
            made.add(node)
    return made


def _tags(sites: Sequence[AttentionSite]) -> dict[str, Hashable]:
    """By the name of a node, what it is to the attentions of its layer."""
    tags: dict[str, list[Hashable]] = {}
    for number, site in enumerate(sites):
        roles = [("query", site.nodes.query), ("key", site.nodes.key), ("map", site.nodes.map)]
        roles += [("value", name) for name in site.nodes.values] + [("context", name) for name in site.nodes.contexts]
        for role, name in roles:
            if name is not None:
                tags.setdefault(name, []).append((number, role))
    return {name: tuple(found) for name, found in tags.items()}


def _colours(
    program: Program,
    layers: Sequence[Sequence[fx.Node]],
    tags: Sequence[Mapping[str, Hashable]],
    projections: Sequence[Sequence[Projection]],
) -> list[list[list[int]]]:
    """By round and layer, the colours of the projections' products."""
    numbers: dict[Hashable, int] = {}

    def numbered(key: Hashable) -> int:
        return numbers.setdefault(key, len(numbers))

    everything = [(layer, node) for layer, nodes in enumerate(layers) for node in nodes if _is_tensor(node)]
    inside = [{node for node in nodes if _is_tensor(node)} for nodes in layers]
    outside = {"parameter": numbered("parameter"), "value": numbered("value")}
    colour = {node: numbered(("operator", *_kind(node), tags[layer].get(node.name))) for layer, node in everything}
    rounds = []
    classes = 0
    for _ in range(_ROUNDS):
        rounds.append([[colour[projection.node] for projection in found] for found in projections])
        if len(set(colour.values())) == classes:
            break
        classes = len(set(colour.values()))
        following = {}
        for layer, node in everything:
            reads = [
                colour[operand] if operand in inside[layer] else outside[_kind_outside(program, operand)]
                for operand in _operands(node)
            ]
            readers = sorted(
                (place, colour[user])
                for user in node.users
                if user in inside[layer]
                for place, operand in enumerate(_operands(user))
                if operand is node
            )
            following[node] = numbered((colour[node], tuple(reads), tuple(readers)))
        colour = following
    return rounds


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(each, torch.Tensor) for each in value)
    )


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node reads, in the order of its arguments, each as often as it is read."""
    found: list[fx.Node] = []

    def collect(operand: fx.Node) -> fx.Node:
        if _is_tensor(operand):
            found.append(operand)
        return operand

    fx.node.map_arg((node.args, node.kwargs), collect)
    return found


def _kind(node: fx.Node) -> tuple[Hashable, ...]:
    if node.op != "call_function":
        return (node.op,)
    op: Any = packet(node)
    name = getattr(op, "__name__", str(op))
    plain = repr(fx.node.map_arg(node.args, lambda _: None)) if name == "getitem" or op in _PIECES else ""
    return (str(op), plain)


def _kind_outside(program: Program, node: fx.Node) -> str:
    return "parameter" if is_parameter(program, node) else "value"


def _aligned(layers: Sequence[str], rounds: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """By place, the number of the projection in every layer, from the last round in which all have the same colours."""
    for colours in reversed(rounds):
        counts = [Counter(found) for found in colours]
        if all(count == counts[0] for count in counts):
            return _by_colour(colours)
    first, other = next((0, layer) for layer, found in enumerate(rounds[0]) if Counter(found) != Counter(rounds[0][0]))
    numbers = len(rounds[0][first]), len(rounds[0][other])
    raise UnsupportedError(
        f"{layers[first]} and {layers[other]} are not built alike: their projections ({numbers[0]} and {numbers[1]}) "
        "do not correspond one to one, so that no weights can be shared between them."
    )


def _by_colour(colours: Sequence[Sequence[int]]) -> list[list[int]]:
    """Projections of one colour correspond in the order of execution; places are in the order of the first layer."""
    waiting: list[dict[int, list[int]]] = []
    for found in colours:
        queues: dict[int, list[int]] = {}
        for index, colour in enumerate(found):
            queues.setdefault(colour, []).append(index)
        waiting.append(queues)
    return [[queues[colour].pop(0) for queues in waiting] for colour in colours[0]]
