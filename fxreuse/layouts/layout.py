"""Layout inference: which row of a weight feeds which channel of which head of an attention.

Nothing is assumed about how a model splits its projections. A tensor of unique (token, row) indices is pushed through
the views between a projection and the operand of the attention, at the sizes of the example, and what arrives is read:
the row behind every (head, channel), and that tokens do not mix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from ..attention import AttentionSite
from ..errors import UnsupportedError
from ..finding.contractions import Contraction, contraction, is_attribute
from ..finding.flow import FUSED
from ..finding.follow import aten, packet
from ..nodes import is_call
from ..program import Program, source_line
from .arrangement import ROWS, Arrangement, arrange, fits
from .projections import Projection, hints, is_move, is_unary, read_projection, run

_SUMS = frozenset({aten.add, aten.sub})
#: Elementwise operators of two tensors after which every channel is still at its place.
KEEPING = frozenset({aten.add, aten.sub, aten.mul, aten.div, aten.masked_fill, aten.where})


@dataclasses.dataclass(frozen=True)
class WeightLayout:
    """Which part of a weight belongs to which channel of which head.

    ``weight`` and ``bias`` are paths of Parameters, ``axis`` the weight's axis that has the rows: its output features
    for queries, keys and values, its input features for the projection that reads the attention. ``rows[h, c]`` is the
    index on that axis that feeds, or is read by, channel ``c`` of head ``h``. Grouped heads are counted once.
    """

    weight: str
    bias: str | None
    axis: int
    rows: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Way:
    """The way from a projection to an operand of an attention, or from an attention to a projection.

    ``nodes`` are in the order of execution; of a way to an operand they go from the value after the projection to the
    operand, of a way from an attention from the context to what the projection reads. ``arrangement`` is that of the
    attention's side, in terms of the projection's tokens and features. ``channels`` are the axes of channels there.
    """

    projection: Projection
    nodes: tuple[fx.Node, ...]
    arrangement: Arrangement
    channels: frozenset[int]

    def layout(self, site: AttentionSite, output: bool) -> WeightLayout:
        """The layout of the projection's weight."""
        projection, found = self.projection, self.arrangement
        axes = found.row_axes()
        heads = [place for place, axis in enumerate(axes) if axis not in self.channels]
        order = [*heads, *(place for place in range(len(axes)) if place not in heads)]
        features = found.rows.permute(order).reshape(math.prod(found.rows.shape[place] for place in heads), -1)
        index = projection.columns if output else projection.rows
        axis = projection.inputs if output else projection.axis
        return WeightLayout(projection.weight, None if output else projection.bias, axis, index[features])


def value_layout(program: Program, site: AttentionSite, context: int = 0) -> WeightLayout:
    """Which rows of which weight are the values of a site.

    Arguments:
        program: a normalised program, before or after reuse.
        site: one of its sites.
        context: which of the map's consumers, where it has several.

    Raises:
        UnsupportedError: where the way from the weight to the values cannot be followed; the node is named.

    >>> import torch, fxreuse
    >>> from fxreuse.finding.find import find
    >>> from fxreuse.frontend.load import load_program
    >>> program = load_program(torch.nn.MultiheadAttention(4, 2, batch_first=True).eval(), (torch.randn(3, 5, 4),) * 3)
    >>> layout = value_layout(program, find(program)[0])
    >>> layout.weight, layout.axis, layout.rows.tolist()
    ('in_proj_weight', 0, [[8, 9], [10, 11]])
    """
    return way_of_values(program, site, context).layout(site, output=False)


def query_layout(program: Program, site: AttentionSite, context: int = 0) -> WeightLayout:
    """Which rows of which weight are the queries of a site. See `value_layout`."""
    return _way_of_scores(program, site, site.nodes.query, "queries").layout(site, output=False)


def key_layout(program: Program, site: AttentionSite, context: int = 0) -> WeightLayout:
    """Which rows of which weight are the keys of a site. See `value_layout`."""
    return _way_of_scores(program, site, site.nodes.key, "keys").layout(site, output=False)


def output_layout(program: Program, site: AttentionSite, context: int = 0) -> WeightLayout:
    """Which columns of which weight read the channels of a site. See `value_layout`."""
    return way_of_output(program, site, context).layout(site, output=True)


def way_of_values(program: Program, site: AttentionSite, context: int = 0) -> Way:
    """The way from the projection of values to the operand that the map is contracted with."""
    operand = program.node(site.nodes.values[context])
    reader = context_of(program, site, context)
    through = copies_between(operand, reader)
    axes = {axis: axis for axis in range(operand.meta["val"].dim())}
    channels, tokens = _roles_of_values(reader, through[-1])
    if len(through) > 1 and any(len(hints(node.meta["val"])) != len(axes) for node in through):
        raise refused(site, "the heads of its values", reader, "repeats them in a way that changes their axes")
    return _way_to(program, site, operand, channels, tokens, "values")


def _way_of_scores(program: Program, site: AttentionSite, name: str | None, what: str) -> Way:
    operand = program.node(str(name))
    channels, tokens = _roles_in_scores(program, site, operand)
    return _way_to(program, site, operand, channels, tokens, what)


def context_of(program: Program, site: AttentionSite, context: int = 0) -> fx.Node:
    """The node that contracts a map with values: the reader of these values. It is found after a rewrite, too.

    Raises:
        UnsupportedError: where values are read by several nodes.
    """
    node = program.node(site.nodes.values[context])
    while True:
        users = [user for user in node.users if not is_call(user, aten.sym_size.int)]
        if len(users) != 1:
            raise UnsupportedError(f"{site}: its values ({node.name}) have {len(users)} readers, one is expected.")
        if packet(users[0]) in FUSED or contraction(users[0]) is not None:
            return users[0]
        if not is_move(users[0]):
            raise refused(site, "the product of map and values", users[0], "comes in between")
        node = users[0]


def copies_between(operand: fx.Node, reader: fx.Node) -> list[fx.Node]:
    """From the operand of an attention to what its product reads: repeated for grouped heads, or the operand itself."""
    chain = [operand]
    while chain[-1] not in reader.all_input_nodes:
        chain.append(next(user for user in chain[-1].users if is_move(user)))
    return chain


def _roles_of_values(reader: fx.Node, values: fx.Node) -> tuple[frozenset[int], frozenset[int]]:
    """The axes of values that are channels, and those that are summed over."""
    rank = values.meta["val"].dim()
    product = contraction(reader)
    if product is None:
        return frozenset({rank - 1}), frozenset({rank - 2})
    labels, _, others = product.side(values)
    return _own_and_summed(product, labels, others)


def _own_and_summed(product: Contraction, labels: str, others: str) -> tuple[frozenset[int], frozenset[int]]:
    own = frozenset(axis for axis, label in enumerate(labels) if label in product.axes and label not in others)
    summed = frozenset(axis for axis, label in enumerate(labels) if label in product.summed)
    return own, summed


def _roles_in_scores(program: Program, site: AttentionSite, operand: fx.Node) -> tuple[frozenset[int], frozenset[int]]:
    """The axes of queries or keys that are channels, and those of tokens."""
    rank = operand.meta["val"].dim()
    if site.fused:
        return frozenset({rank - 1}), frozenset({rank - 2})
    names = {site.nodes.query, site.nodes.key}
    for user in operand.users:
        product = contraction(user)
        if product is not None and {product.left.name, product.right.name} == names:
            labels, _, others = product.side(operand)
            own, summed = _own_and_summed(product, labels, others)
            return summed, own
    raise UnsupportedError(f"{site}: {operand.name} is not read by a product of queries and keys.")


def _way_to(
    program: Program,
    site: AttentionSite,
    operand: fx.Node,
    channels: frozenset[int],
    tokens: frozenset[int],
    what: str,
) -> Way:
    """The way from a projection to an operand, with the arrangement of the operand."""
    subject = f"which weight rows are its {what}"
    found = back_to_projection(program, operand)
    if isinstance(found, Obstacle):
        raise refused(site, subject, found.node, found.reason)
    projection, nodes = found
    arrangement = arrangement_at(projection, nodes)
    if arrangement is None:
        raise refused(site, subject, operand, "mixes tokens and channels, or joins them with something else")
    _check_roles(site, subject, operand, arrangement, channels, tokens)
    return Way(projection, nodes, arrangement, channels)


def _check_roles(
    site: AttentionSite,
    subject: str,
    node: fx.Node,
    found: Arrangement,
    channels: frozenset[int],
    tokens: frozenset[int],
) -> None:
    mixed = [f for f in found.factors if (f.axis in channels) != (f.kind == ROWS) and f.axis in channels | tokens]
    if mixed:
        raise refused(site, subject, node, "has channels among its tokens, or tokens among its channels")


def arrangement_at(projection: Projection, nodes: Iterable[fx.Node]) -> Arrangement | None:
    """The arrangement of the last node, from pushing indices of tokens and features through the nodes."""
    indices, count = indices_of(hints(projection.result.meta["val"]), projection.feature)
    last = projection.result
    for last in nodes:
        indices = push(last, indices)
    found = arrange(*indices, count)
    return found if found is not None and fits(found, last) else None


def push(node: fx.Node, indices: tuple[Any, Any]) -> tuple[Any, Any]:
    """Indices of tokens and features, moved and broadcast as a node does with its first argument."""
    tokens, rows = (run(node, index) for index in indices)
    if not isinstance(node.meta["val"], torch.Tensor):
        return tokens, rows
    shape = hints(node.meta["val"])
    return tokens.broadcast_to(shape), rows.broadcast_to(shape)


def indices_of(shape: tuple[int, ...], feature: int) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
    """For every element of tokens × features the number of its token and its feature, and the number of tokens."""
    count = math.prod(shape) // shape[feature]
    tokens = torch.arange(count).reshape(*shape[:feature], 1, *shape[feature + 1 :]).expand(shape)
    rows = torch.arange(shape[feature]).reshape(-1, *[1] * (len(shape) - feature - 1)).expand(shape)
    return (tokens, rows), count


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """A node that channels cannot be followed through, and what it does."""

    node: fx.Node
    reason: str


def back_to_projection(program: Program, operand: fx.Node) -> tuple[Projection, tuple[fx.Node, ...]] | Obstacle:
    """The projection that a value comes from, and the nodes after it up to the value.

    Followed are moves, casts, dropout, and elementwise operators whose other operands do not come from the projection.
    """
    nodes: list[fx.Node] = []
    node = operand
    while True:
        projection = read_projection(program, node)
        if projection is not None:
            return projection, tuple(reversed(nodes))
        nodes.append(node)
        if is_move(node) or is_unary(node, program):
            node = node.all_input_nodes[0]
        elif node.op == "call_function" and packet(node) in KEEPING:
            return _through_elementwise(program, node, nodes)
        else:
            return Obstacle(node, _what(node))


def _through_elementwise(
    program: Program, node: fx.Node, nodes: list[fx.Node]
) -> tuple[Projection, tuple[fx.Node, ...]] | Obstacle:
    """On along the one operand that comes from a projection."""
    operands = [operand for operand in node.all_input_nodes if isinstance(operand.meta["val"], torch.Tensor)]
    found = {operand: back_to_projection(program, operand) for operand in operands}
    ways = {operand: way for operand, way in found.items() if not isinstance(way, Obstacle)}
    if not ways:
        return next(way for way in found.values() if isinstance(way, Obstacle))
    if len(ways) > 1:
        return Obstacle(node, "combines several projections")
    ((operand, (projection, before)),) = ways.items()
    if any(_depends(other, projection.result) for other in operands if other is not operand):
        return Obstacle(node, "combines channels with one another, as norms and rotary embeddings do")
    return projection, (*before, *reversed(nodes))


def _depends(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node is made from another one."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current is source:
            return True
        ahead = [operand for operand in current.all_input_nodes if operand not in seen and not operand < source]
        seen.update(ahead)
        pending.extend(ahead)
    return False


def _what(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "is an input of the model, and not projected"
    if node.op == "get_attr":
        return "is a parameter or a constant, and not projected"
    if node.op == "call_function" and "norm" in str(packet(node)):
        return "normalises channels"
    return "is neither a move nor elementwise, nor a product with a weight matrix"


def way_of_output(program: Program, site: AttentionSite, context: int = 0) -> Way:
    """The way from what a map makes of values to the projection that reads it."""
    subject = "which weight columns read its channels"
    reader = context_of(program, site, context)
    found = list(_forward(program, (reader,)))
    ways = [way for way in found if not isinstance(way, Obstacle)]
    obstacles = [way for way in found if isinstance(way, Obstacle)]
    if len(ways) > 1:
        obstacles = [Obstacle(reader, f"is read by {len(ways)} projections")]
    if obstacles or not ways:
        stop = obstacles[0] if obstacles else Obstacle(reader, "is not read")
        raise refused(site, subject, stop.node, stop.reason)
    ((projection, nodes),) = ways
    arrangement = _arrangement_before(projection, nodes)
    if arrangement is None:
        raise refused(site, subject, projection.source, "mixes tokens and channels, or leaves out some of them")
    channels, queries = _roles_of_context(program, site, reader, context)
    _check_roles(site, subject, reader, arrangement, channels, queries)
    return Way(projection, nodes, arrangement, channels)


def _forward(
    program: Program, nodes: tuple[fx.Node, ...]
) -> Iterator[tuple[Projection, tuple[fx.Node, ...]] | Obstacle]:
    """Every projection that reads a value, with the nodes up to it, and every other reader."""
    for user in nodes[-1].users:
        projection = read_projection(program, user)
        if projection is not None and projection.source is nodes[-1]:
            yield projection, nodes
        elif packet(user) in _SUMS and any(not is_attribute(o) for o in _others(user, nodes[-1])):
            yield Obstacle(user, "adds channels of another value to them, as a residual connection does")
        elif is_move(user) or is_unary(user, program) or (user.op == "call_function" and packet(user) in KEEPING):
            yield from _forward(program, (*nodes, user))
        elif not is_call(user, aten.sym_size.int):
            yield Obstacle(user, _what(user))


def _others(node: fx.Node, operand: fx.Node) -> list[fx.Node]:
    """The tensors that a node combines an operand with."""
    tensors = [o for o in node.all_input_nodes if isinstance(o.meta.get("val"), torch.Tensor)]
    return [o for o in tensors if o is not operand]


def _arrangement_before(projection: Projection, nodes: tuple[fx.Node, ...]) -> Arrangement | None:
    """The arrangement of the first node in terms of the tokens and features of what a projection reads."""
    shape = hints(nodes[0].meta["val"])
    elements: Any = torch.arange(math.prod(shape)).reshape(shape)
    for node in nodes[1:]:
        elements, _ = push(node, (elements, elements))
    (tokens, rows), count = indices_of(hints(projection.source.meta["val"]), projection.input_feature)
    places = elements.flatten().argsort()
    if not torch.equal(elements.flatten()[places], torch.arange(math.prod(shape))):
        return None
    found = arrange(tokens.flatten()[places].reshape(shape), rows.flatten()[places].reshape(shape), count)
    return found if found is not None and fits(found, nodes[0]) else None


def _roles_of_context(
    program: Program, site: AttentionSite, reader: fx.Node, context: int
) -> tuple[frozenset[int], frozenset[int]]:
    """The axes of a context that are channels, and those of queries."""
    product = contraction(reader)
    if product is None:
        rank = reader.meta["val"].dim()
        return frozenset({rank - 1}), frozenset({rank - 2})
    values = copies_between(program.node(site.nodes.values[context]), reader)[-1]
    labels, _, others = product.side(values)
    own = frozenset(axis for axis, label in enumerate(product.axes) if label in labels and label not in others)
    queries = frozenset(axis for axis, label in enumerate(product.axes) if label in others and label not in labels)
    return own, queries


def refused(site: AttentionSite, subject: str, node: fx.Node, reason: str) -> UnsupportedError:
    """An error that names site, node and source line."""
    return UnsupportedError(f"{site}: {subject} cannot be told, since {named(node)} {reason}.")


def named(node: fx.Node) -> str:
    """A node by its name, its operator and the source line that it came from."""
    parts = [str(node.target), source_line(node)]
    return f"{node.name} ({', '.join(part for part in parts if part)})"
