"""The parts of a model that a breakdown tells apart: attention, reused attention, feed-forward, convolution, the rest.

The parts are found on the original program by data flow. Names of classes play no role; paths only say what belongs
together: what a layer calls as one module is one part of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import fx

from ..attention import AttentionSite
from ..program import Program, get_attribute, module_stack
from .macs import macs_of
from .sizes import operands, operator_name, shape

#: The parts, in the order of a table.
PARTS = ("attention", "reused attention", "feed-forward", "convolution", "rest")

_INNER = frozenset({"attention", "map", "softmax", "product"})


@dataclasses.dataclass(frozen=True)
class Parts:
    """Which part of a model each module call is, and its layers.

    ``layers`` are the paths of the layers with attention. ``modules`` has the part of every module that a layer calls,
    by path; what a layer does itself goes by its kind and its surroundings. ``sites`` has the layer and the module of
    every attention, and ``followers`` those attentions that use the map of another.
    """

    layers: frozenset[str] = frozenset()
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sites: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    followers: frozenset[str] = frozenset()

    @classmethod
    def of(cls, program: Program, sites: Iterable[AttentionSite]) -> Parts:
        """The parts of a program as it was captured, before any rewrite."""
        sites = [site for site in sites if site.layer_path]
        layers = frozenset(site.layer_path for site in sites)
        modules: dict[str, str] = {}
        placed = {}
        inside = _by_layer(program, layers)
        nodes = {node.name: node for node in program.graph.nodes}
        for layer in layers:
            mine = [site for site in sites if site.layer_path == layer]
            groups = _groups(inside[layer], layer)
            modules |= _named(
                program, inside[layer], groups, _attending(program, mine, nodes, set(inside[layer])), layer
            )
            for site in mine:
                placed[str(site)] = layer, _plain(groups[nodes[site.nodes.map]])
        return cls(layers, modules, placed)

    def following(self, followers: Iterable[str]) -> Parts:
        """The same parts where these attentions use the map of another."""
        return dataclasses.replace(self, followers=frozenset(followers))

    def of_module(self, path: str, layer: str | None = None) -> str | None:
        """The part of a module, in one of its layers where it is called in several.

        None where it is a layer, or inside of one where its path alone does not say.
        """
        found = _enclosing(path, self.modules)
        if found is None:
            return "rest" if _enclosing(path, map(_plain, self.layers)) is None else None
        if self.modules[found] != "attention":
            return self.modules[found]
        return self._attention(layer or found, found)

    def of_layer(self, path: str) -> str:
        """The part that the parameters of a layer itself count for: its attention, where it has one."""
        return self._attention(_plain(path), None)

    def of_operator(self, path: str, layer: str, kind: str, before: str | None) -> str:
        """The part of an operator.

        Arguments:
            path: the innermost module call that it is in.
            layer: the layer that it is in, empty where in none.
            kind: the kind of its work, see `kinds.KINDS`.
            before: the part of the operator before it in that layer; None where it is the first.
        """
        part = self.of_module(path, layer) if layer else "rest"
        if part is not None:
            return part
        return self._attention(layer, None) if kind in _INNER else before or "rest"

    def _attention(self, place: str, module: str | None) -> str:
        """Whether the attentions of a layer or a module, or of a module in a layer, all use the maps of others."""
        layers = {there[0] for there in self.sites.values()}
        exactly = place if place in layers else None
        around = _enclosing(place, map(_plain, layers))
        near = {
            site: there
            for site, there in self.sites.items()
            if (there[0] == exactly if exactly else _plain(there[0]) == around)
        }
        exact = {site for site, there in near.items() if there[1] == module} or set(near)
        return "reused attention" if exact and exact <= self.followers else "attention"


def _plain(path: str) -> str:
    """The path of a module without the number of a call.

    >>> _plain("encoder.layer@1.attention")
    'encoder.layer.attention'
    """
    return re.sub(r"@\d+", "", path)


def _enclosing(path: str, known: Iterable[str]) -> str | None:
    """The innermost path around a module, or its own, that is known."""
    known, place = frozenset(known), _plain(path)
    while place:
        if place in known:
            return place
        place = place.rpartition(".")[0]
    return None


def _by_layer(program: Program, layers: frozenset[str]) -> dict[str, list[fx.Node]]:
    """The calls of every layer in order."""
    found: dict[str, list[fx.Node]] = {layer: [] for layer in layers}
    for node in program.graph.nodes:
        if node.op in ("call_function", "call_module"):
            layer = next((path for path in reversed(module_stack(node)) if path in layers), None)
            if layer is not None:
                found[layer].append(node)
    return found


def _groups(nodes: Iterable[fx.Node], layer: str) -> dict[fx.Node, str]:
    """The module that the layer calls and that a node is in; the layer itself where it is in none."""
    groups = {}
    for node in nodes:
        stack = module_stack(node)
        inner = stack[stack.index(layer) + 1 :]
        groups[node] = inner[0] if inner else layer
    return groups


def _attending(
    program: Program, sites: Sequence[AttentionSite], nodes: Mapping[str, fx.Node], inside: set[fx.Node]
) -> set[fx.Node]:
    """What computes the operands of attentions, back to the projections, and what projects their contexts."""
    found: set[fx.Node] = set()
    for site in sites:
        makers = [nodes[site.nodes.map], *(nodes[name] for name in site.nodes.contexts)]
        found.update(_reached(program, makers, inside, _operands))
        contexts = [nodes[name] for name in site.nodes.contexts]
        found.update(_reached(program, contexts, inside, _users))
    return found


def _reached(
    program: Program, start: Iterable[fx.Node], inside: set[fx.Node], near: Callable[[fx.Node], list[fx.Node]]
) -> Iterator[fx.Node]:
    """Nodes from some on, up to the first contractions with a weight."""
    pending, seen = list(start), set(start)
    while pending:
        node = pending.pop()
        yield node
        if node.op != "call_function" or _weighs(program, node):
            continue
        for other in near(node):
            if other in inside and other not in seen:
                seen.add(other)
                pending.append(other)


def _operands(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes


def _users(node: fx.Node) -> list[fx.Node]:
    return list(node.users)


def _weighs(program: Program, node: fx.Node) -> bool:
    """Whether a node contracts with a weight, which may be transposed or cast on the way."""
    return macs_of(node) != 0 and any(_is_weight(program, operand) for operand in node.all_input_nodes)


def _is_weight(program: Program, node: fx.Node) -> bool:
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "get_attr" and getattr(get_attribute(program.module, str(node.target)), "ndim", 0) > 1


def _named(
    program: Program, nodes: Sequence[fx.Node], groups: Mapping[fx.Node, str], attending: set[fx.Node], layer: str
) -> dict[str, str]:
    """The part of every module that a layer calls."""
    parts: dict[str, str] = {}
    for node in nodes:
        group, weighs = groups[node], _weighs(program, node)
        if group == layer:
            continue
        if node in attending and (weighs or macs_of(node) != 0):
            parts[group] = "attention"
        elif weighs and parts.get(group) not in ("attention", "convolution"):
            parts[group] = "convolution" if _is_convolution(node) else "feed-forward"
    parts |= _without_weights(nodes, groups, parts, layer)
    return {_plain(path): part for path, part in parts.items()}


def _without_weights(
    nodes: Sequence[fx.Node], groups: Mapping[fx.Node, str], parts: Mapping[str, str], layer: str
) -> dict[str, str]:
    """The part of every module without contractions.

    It belongs to what comes after it, as a norm in front of an attention does; to what comes before it where a residual
    connection reads it or adds it to something, as one behind does, or where nothing comes after.
    """
    found = {}
    order = [group for group in dict.fromkeys(groups[node] for node in nodes) if group != layer]
    for place, group in enumerate(order):
        if group in parts:
            continue
        before = next((parts[other] for other in reversed(order[:place]) if other in parts), None)
        after = next((parts[other] for other in order[place + 1 :] if other in parts), None)
        mine = [node for node in nodes if groups[node] == group]
        read = {user for node in mine for user in node.users if groups.get(user) != group}
        if before is not None and (after is None or any(_adds(user) for user in read)):
            found[group] = before
        elif after is not None:
            found[group] = after
    return found


def _adds(node: fx.Node) -> bool:
    return operator_name(node) == "aten.add"


def _is_convolution(node: fx.Node) -> bool:
    """Whether a contraction slides a kernel of more than one tap."""
    if not operator_name(node).startswith("aten.conv"):
        return False
    return any(size != 1 for size in shape(operands(node)[1])[2:])
