"""From a softmax back to its scores: the product of queries and keys among everything that they are made of."""

from __future__ import annotations

import dataclasses
import itertools

from torch import fx

from .axes import Layout, Part, sizes, start
from .contractions import Contraction, contraction
from .flow import Flow
from .follow import followable, transfer


@dataclasses.dataclass(frozen=True)
class Scores:
    """The product behind a softmax. ``spine`` are the nodes from it to the softmax's input, both included."""

    product: Contraction
    query: fx.Node
    key: fx.Node
    spine: tuple[fx.Node, ...]


def find_scores(softmax: fx.Node, dim: int, flow: Flow) -> Scores | str:
    """The product of queries and keys that a softmax over dimension ``dim`` normalises, or why there is none.

    Of several products (a relative-position term is one, too) it is the one both of whose operands carry tokens, or
    else are projected, and whose axes arrive at the softmax unmixed.
    """
    top = softmax.args[0]
    assert isinstance(top, fx.Node)
    reader = _walk(top, flow)
    products = [c for c in map(contraction, reader) if c is not None]
    if not products:
        return "its scores are not a product of queries and keys"
    found = [s for s in (_scores(p, top, dim, reader, flow) for p in products) if s is not None]
    for accept in (_of_tokens, _of_projections):
        for scores in sorted(found, key=lambda s: flow.order[s.product.node]):
            if accept(scores, flow):
                return scores
    return _why_none(products, flow)


def _walk(top: fx.Node, flow: Flow) -> dict[fx.Node, fx.Node | None]:
    """The nodes behind the scores down to the nearest products, each with the node through which it was reached."""
    reader: dict[fx.Node, fx.Node | None] = {top: None}
    pending = [top]
    while pending:
        node = pending.pop()
        found = contraction(node)
        ahead = followable(node, flow.program) if found is None else [found.addend] if found.addend else []
        for operand in ahead:
            if operand not in reader and (operand in flow.tokens or operand in flow.projected):
                reader[operand] = node
                pending.append(operand)
    return reader


def _scores(
    product: Contraction, top: fx.Node, dim: int, reader: dict[fx.Node, fx.Node | None], flow: Flow
) -> Scores | None:
    """The product as scores, if exactly one axis of one operand alone arrives at the softmax's dimension."""
    spine = [product.node]
    while (above := reader[spine[-1]]) is not None:
        spine.append(above)
    layout = start(product.node, product.axes)
    for operand, node in itertools.pairwise(spine):
        after = push(node, operand, layout, flow)
        if after is None:
            return None
        layout = after
    at = layout[dim % len(layout)]
    if len(at) != 1 or at[0].piece or not product.summed:
        return None
    label = str(at[0].source)
    in_left, in_right = label in product.left_axes, label in product.right_axes
    if in_left == in_right:
        return None
    query, key = (product.right, product.left) if in_left else (product.left, product.right)
    return Scores(product, query, key, tuple(spine))


def push(node: fx.Node, operand: fx.Node, layout: Layout, flow: Flow) -> Layout | None:
    """`transfer`, and through the addend of a product with one."""
    found = contraction(node)
    if found is None:
        return transfer(node, operand, layout, flow.program)
    if operand is not found.addend or len(sizes(operand)) != len(sizes(node)):
        return None
    return tuple(
        dim if before == after else (Part(None, after),)
        for dim, before, after in zip(layout, sizes(operand), sizes(node), strict=True)
    )


def _of_tokens(scores: Scores, flow: Flow) -> bool:
    return scores.query in flow.tokens and scores.key in flow.tokens


def _of_projections(scores: Scores, flow: Flow) -> bool:
    """Learned queries, if projected: the latents of a Perceiver, the object queries of a DETR. Keys likewise."""
    return all(node in flow.tokens or node in flow.projected for node in (scores.query, scores.key))


def _why_none(products: list[Contraction], flow: Flow) -> str:
    first = products[0]
    if first.left in flow.tokens and first.right in flow.tokens:
        return f"its scores come from the product {first.node.name}, whose axes cannot be followed to the softmax"
    return f"its scores are a projection by parameters ({first.node.name}), not a product of queries and keys"
