"""From a softmax forward to its consumers: the products that contract it with values."""

from __future__ import annotations

import dataclasses

from torch import fx

from .axes import Layout, Size, product, sizes, start
from .contractions import Contraction, contraction
from .flow import Flow
from .follow import SAME_VALUE, aten, is_elementwise, packet
from .scores import push

#: Elementwise operators that a map goes through on its way to the values: scaling, head masks, cleaning up.
_MAP_OPERATORS = frozenset({
    aten.mul, aten.multiply, aten.div, aten.divide, aten.true_divide, aten.where, aten.masked_fill, aten.nan_to_num,
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Context:
    """A product of a map with values, and the number of channels that a value has for every head."""

    node: fx.Node
    values: fx.Node
    value_dim: Size


def find_contexts(softmax: fx.Node, dim: int, flow: Flow) -> list[Context] | str:
    """The products that contract a softmax over dimension ``dim`` with values, or why there are none.

    Follows the map through views, casts, dropout, masks and mixing of heads. Something that only averages or returns
    the map is no consumer.
    """
    axis = dim % len(sizes(softmax))
    layouts: dict[fx.Node, Layout] = {softmax: start(softmax)}
    found: list[tuple[Contraction, fx.Node]] = []
    elsewhere: list[fx.Node] = []
    for node in _downstream(softmax, flow):
        consumer = contraction(node)
        read = node.all_input_nodes if consumer is None else consumer.operands
        reached = [(o, layouts[o]) for o in read if o in layouts]
        for operand, layout in reached:
            if consumer is not None and operand is not consumer.addend:
                summed = _summed_sources(consumer, operand, layout)
                if summed == {axis} or (axis in summed and _keeps_queries(consumer, operand)):
                    found.append((consumer, operand))
                    continue
                if summed - {None} and consumer.side(operand)[1] in flow.tokens:
                    elsewhere.append(node)
                    continue
            after = _onward(node, operand, layout, consumer, axis, flow)
            if after is not None:
                layouts[node] = after
    contexts = [_context(c, operand) for c, operand in found if c.side(operand)[1] not in layouts]
    if contexts:
        return contexts
    if elsewhere:
        return f"{elsewhere[0].name} sums it over another axis than the one that it is normalised over"
    return "no matrix product contracts it over its own axis"


def _downstream(softmax: fx.Node, flow: Flow) -> list[fx.Node]:
    """The nodes that a map may go through or end at, in order of execution."""
    seen: set[fx.Node] = set()
    pending = [softmax]
    while pending:
        node = pending.pop()
        for user in node.users:
            if user not in seen and user.op != "output":
                seen.add(user)
                if _carries_on(user, node, flow):
                    pending.append(user)
    return sorted(seen, key=flow.order.__getitem__)


def _carries_on(node: fx.Node, operand: fx.Node, flow: Flow) -> bool:
    consumer = contraction(node)
    if consumer is not None:
        return operand is not consumer.addend and consumer.side(operand)[1] not in flow.tokens
    return not is_elementwise(node) or packet(node) in _MAP_OPERATORS or packet(node) in SAME_VALUE


def _summed_sources(consumer: Contraction, operand: fx.Node, layout: Layout) -> set[object]:
    """The axes of the map over which a product sums, where it sums over whole ones; pieces count as None."""
    labels = consumer.side(operand)[0]
    parts = [part for label, dim in zip(labels, layout, strict=True) if label in consumer.summed for part in dim]
    return {None if part.piece else part.source for part in parts}


def _keeps_queries(consumer: Contraction, operand: fx.Node) -> bool:
    """Whether a product of a map that sums over heads, too, has an axis of the map that the values do not have."""
    labels, _, others = consumer.side(operand)
    return any(label in consumer.axes and label not in others for label in labels)


def _onward(
    node: fx.Node, operand: fx.Node, layout: Layout, consumer: Contraction | None, axis: int, flow: Flow
) -> Layout | None:
    """The layout of what a node makes of a map, as long as it is still a map: the axis is there, and in one piece."""
    if not _carries_on(node, operand, flow):
        return None
    if consumer is not None:
        after: Layout | None = consumer.push(operand, layout)
    else:
        after = push(node, operand, layout, flow)
    if after is None:
        return None
    whole = [dim for dim in after if any(part.source == axis for part in dim)]
    return after if len(whole) == 1 else None


def _context(consumer: Contraction, operand: fx.Node) -> Context:
    labels, values, value_labels = consumer.side(operand)
    shape = dict(zip(value_labels, sizes(values), strict=True))
    own = [label for label in value_labels if label not in labels]
    return Context(consumer.node, values, product(shape[label] for label in own))
