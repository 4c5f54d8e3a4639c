"""From a softmax back to its scores: the product of queries and keys among everything that they are made of."""

from __future__ import annotations

import dataclasses
import itertools

from torch import fx

from ..program import tensor_inputs
from .axes import Layout, Part, sizes, start
from .contractions import Contraction, contraction
from .flow import Flow
from .follow import followable, is_elementwise, transfer


@dataclasses.dataclass(frozen=True)
class Scores:
    """The product behind a softmax. ``spine`` are the nodes from it to the softmax's input, both included."""

    product: Contraction
    query: fx.Node
    key: fx.Node
    spine: tuple[fx.Node, ...]


def find_scores(top: fx.Node, dim: int, flow: Flow) -> Scores | str:
    """The product of queries and keys that a softmax of ``top`` over ``dim`` normalises, or why there is none.

    Of several products (a relative-position term is one, too) it is the one both of whose operands carry tokens, or
    else are projected, and whose axes arrive at the softmax unmixed. Heads may be mixed on the way by parameters.
    """
    reader: dict[fx.Node, fx.Node | None] = {top: None}
    products = _products(top, reader, flow)
    if not products:
        return _without_products(reader, flow)
    found = _best(products, dim, reader, flow)
    if found is None:
        mixed = [p for p in products if _mixes_heads_of_scores(p, dim, reader, flow)]
        behind = [p for mixing in mixed for p in _products(_mixed(mixing, flow), reader, flow, mixing.node)]
        found = _best(behind, dim, reader, flow)
    return _why_none(products, flow) if found is None else found


def _best(products: list[Contraction], dim: int, reader: dict[fx.Node, fx.Node | None], flow: Flow) -> Scores | None:
    """Of several products the first one that makes scores, of tokens or else of projections."""
    found = [s for s in (_scores(p, dim, reader, flow) for p in products) if s is not None]
    for accept in (_of_tokens, _of_projections):
        for scores in sorted(found, key=lambda s: flow.order[s.product.node]):
            if accept(scores, flow):
                return scores
    return None


def _products(
    start_at: fx.Node, reader: dict[fx.Node, fx.Node | None], flow: Flow, below: fx.Node | None = None
) -> list[Contraction]:
    """The nearest products behind a value. ``reader`` is told for every node through which other it was reached."""
    reader.setdefault(start_at, below)
    pending = [start_at]
    products = []
    while pending:
        node = pending.pop()
        found = contraction(node)
        if found is not None:
            products.append(found)
        ahead = followable(node, flow.program) if found is None else [found.addend] if found.addend else []
        for operand in ahead:
            if operand not in reader and (operand in flow.tokens or operand in flow.projected):
                reader[operand] = node
                pending.append(operand)
    return products


def _spine(node: fx.Node, reader: dict[fx.Node, fx.Node | None]) -> list[fx.Node]:
    spine = [node]
    while (above := reader[spine[-1]]) is not None:
        spine.append(above)
    return spine


def _followed(product: Contraction, spine: list[fx.Node], flow: Flow) -> Layout | None:
    """Where the axes of a product are in the softmax's input; None where heads and other axes are mixed."""
    shared = frozenset(product.left_axes) & frozenset(product.right_axes)
    layout: Layout | None = start(product.node, product.axes)
    for operand, node in itertools.pairwise(spine):
        assert layout is not None
        mixing = contraction(node)
        if mixing is not None and operand is not mixing.addend and not mixing.sources(operand, layout) <= shared:
            return None
        layout = push(node, operand, layout, flow)
        if layout is None:
            return None
    return layout


def _scores(product: Contraction, dim: int, reader: dict[fx.Node, fx.Node | None], flow: Flow) -> Scores | None:
    """The product as scores, if exactly one axis of one operand alone arrives at the softmax's dimension."""
    spine = _spine(product.node, reader)
    label = _softmax_label(product, spine, dim, flow)
    if label is None or not product.summed:
        return None
    in_left, in_right = label in product.left_axes, label in product.right_axes
    if in_left == in_right:
        return None
    query, key = (product.right, product.left) if in_left else (product.left, product.right)
    return Scores(product, query, key, tuple(spine))


def _softmax_label(product: Contraction, spine: list[fx.Node], dim: int, flow: Flow) -> str | None:
    """The label of the product's axis that a softmax over ``dim`` normalises."""
    layout = _followed(product, spine, flow)
    at = () if layout is None else layout[dim % len(layout)]
    return str(at[0].source) if len(at) == 1 and not at[0].piece else None


def _mixed(mixing: Contraction, flow: Flow) -> fx.Node:
    """The operand of a product with parameters that is no parameter."""
    return mixing.left if mixing.left in flow.tokens else mixing.right


def _mixes_heads_of_scores(mixing: Contraction, dim: int, reader: dict[fx.Node, fx.Node | None], flow: Flow) -> bool:
    """Whether a product may be one of scores with parameters that mixes their heads.

    What it multiplies has batch, queries and keys beside what it sums over, and the softmax is over one of these.
    """
    if (mixing.left in flow.tokens) == (mixing.right in flow.tokens) or len(mixing.summed) != 1:
        return False
    labels, other, _ = mixing.side(_mixed(mixing, flow))
    if len(labels) < 4 or other in flow.inputs:
        return False
    return (_softmax_label(mixing, _spine(mixing.node, reader), dim, flow) or "") in set(labels) - mixing.summed


def push(node: fx.Node, operand: fx.Node, layout: Layout, flow: Flow) -> Layout | None:
    """`transfer`, and through products: the axis that one sums over is the source of the one that takes its place."""
    found = contraction(node)
    if found is None:
        return transfer(node, operand, layout, flow.program)
    if operand is not found.addend:
        sources = found.sources(operand, layout)
        return found.push(operand, layout, sources.pop() if len(sources) == 1 else None)
    if len(sizes(operand)) != len(sizes(node)):
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


def _without_products(reader: dict[fx.Node, fx.Node | None], flow: Flow) -> str:
    """Why there are no products behind scores: what the way back ends at."""
    read = set(reader.values())
    ends = [n for n in reader if n not in read and n.op == "call_function" and n in flow.tokens]
    what = f" but come from {min(ends, key=flow.order.__getitem__).name}" if ends else ""
    return f"its scores are not a product of queries and keys{what}"


def _why_none(products: list[Contraction], flow: Flow) -> str:
    first = products[0]
    if first.left in flow.tokens and first.right in flow.tokens:
        return f"its scores come from the product {first.node.name}, whose axes cannot be followed to the softmax"
    if first.left not in flow.inputs and first.right not in flow.inputs:
        return f"its scores are a product of parameters alone ({first.node.name}), the same for every input"
    if _is_outer_sum(_mixed(first, flow), flow):
        return f"its scores are a projection of sums of queries and keys ({first.node.name}), not a product of the two"
    return f"its scores are a projection by parameters ({first.node.name}), not a product of queries and keys"


def _is_outer_sum(node: fx.Node, flow: Flow) -> bool:
    """Whether a value is a function of the sum of each of some tokens with each of others, element by element."""
    while is_elementwise(node):
        operands = [o for o in tensor_inputs(node) if o in flow.tokens]
        if len(operands) == 2:
            shapes = [sizes(o) for o in operands]
            return len(shapes[0]) == len(shapes[1]) and all(
                any(a == 1 and b != 1 for a, b in zip(one, other, strict=True)) for one, other in (shapes, shapes[::-1])
            )
        if len(operands) != 1:
            return False
        node = operands[0]
    return False
