"""Read what is done with an attention map, up to its product with values, as a fused attention would do it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import fx

from fxreuse.attention import AttentionSite
from fxreuse.finding.axes import Layout, Part, sizes
from fxreuse.finding.contractions import Contraction, contraction
from fxreuse.finding.follow import arguments, packet, transfer
from fxreuse.program import Program

from .affine import COPIES, MOVES, PRODUCTS, QUOTIENTS, Factor, behind, refusal
from .arrange import Term, without_ones
from .fused import Fused

_aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Consumer:
    """A product of a map with values.

    ``value`` and ``result`` are laid out in the axes of the scores and in ``channels``, those that only values have.
    ``dropout`` is the probability of the map's dropout: a number, a node that gives it, or a Dropout module.
    ``zeroed`` are the conditions, each with its sense, under which the map is set to 0 behind the softmax; ``factors``
    and ``number`` are what it is multiplied with. ``without_sink`` says that the last key, a sink, was left out.
    """

    node: fx.Node
    value: Term
    result: Layout
    channels: tuple[Part, ...]
    dropout: float | fx.Node | torch.nn.Dropout = 0.0
    zeroed: tuple[tuple[fx.Node, bool], ...] = ()
    factors: tuple[Factor, ...] = ()
    number: float = 1.0
    without_sink: bool = False

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """All layouts that the reading met."""
        return (self.value.layout, self.result)


def fused_consumer(node: fx.Node, layout: Layout) -> Consumer:
    """A fused attention, whose map has the layout ``layout``, as a consumer of another one's map."""
    fused = Fused.of(node)
    channel = (Part("channel", sizes(fused.value)[-1]),)
    own = sizes(fused.value)
    batch = layout[: len(own) - 2] if len(layout) == len(own) else layout[:-2]
    dims = (*(() if size == 1 else dim for dim, size in zip(batch, own[:-2], strict=True)), layout[-1], channel)
    return Consumer(
        node,
        Term(fused.value, without_ones(dims)),
        (*layout[:-1], channel),
        without_ones((channel,))[0],
        fused.dropout_p,
    )


def read_consumer(
    program: Program, site: AttentionSite, map_node: fx.Node, layout: Layout, keys: tuple[Part, ...], name: str
) -> Consumer:
    """How the product ``name`` uses the map of an unfused site, which has the layout ``layout`` with the axis ``keys``.

    On the way there may be views, casts, one dropout, and zeroing by a mask; ``nan_to_num`` does nothing to a map that
    has no NaN, as that of a fused attention.

    Raises:
        UnsupportedError: where there is anything else; the operator and its line are named.
    """
    node = program.node(name)
    product = contraction(node)
    if product is None or product.addend is not None or arguments(node).get("alpha", 1) != 1:
        raise refusal(site, node, "needs a plain product of the map with the values")
    for operand in (product.left, product.right):
        chain = _chain(site, map_node, operand, program)
        if chain is not None:
            break
    else:
        raise refusal(site, node, f"needs the map itself in this product, not {product.left} or {product.right}")
    reader = _Reader(program, site, layout, keys)
    for before, after in itertools.pairwise(chain):
        reader.step(after, before)
    return reader.consumer(product, chain[-1])


def _chain(site: AttentionSite, map_node: fx.Node, operand: fx.Node, program: Program) -> list[fx.Node] | None:
    """The nodes from the map to an operand of a product; None if it does not come from the map."""
    chain = [operand]
    if map_node not in behind(operand):
        return None
    while chain[-1] is not map_node:
        sources = [node for node in chain[-1].all_input_nodes if node is map_node or map_node in behind(node)]
        if len(sources) != 1:
            raise refusal(site, chain[-1], "needs the map to go to its values in one piece, but it meets itself here")
        chain.append(sources[0])
    return chain[::-1]


class _Reader:
    """What a map has gone through, node by node."""

    def __init__(self, program: Program, site: AttentionSite, layout: Layout, keys: tuple[Part, ...]) -> None:
        self._program, self._site, self._layout, self._keys = program, site, layout, keys
        self._dropout: float | fx.Node | torch.nn.Dropout = 0.0
        self._zeroed: list[tuple[fx.Node, bool]] = []
        self._factors: list[Factor] = []
        self._number = 1.0
        self._without_sink = False

    def step(self, node: fx.Node, operand: fx.Node) -> None:
        """From ``operand`` to ``node``, which reads it."""
        op = packet(node)
        if op in MOVES:
            layout = transfer(node, operand, self._layout, self._program)
            if layout is None or any(part.source is None for dim in layout for part in dim if part.size != 1):
                raise refusal(self._site, node, "cannot follow the axes of the map through this operator")
            self._layout = layout
        elif node.op == "call_module":
            self._module(node)
        elif op is _aten.dropout and operand is node.args[0]:
            if arguments(node)["train"]:
                self._drop(node, arguments(node)["p"])
        elif op in (_aten.masked_fill, _aten.where):
            self._zero(node, operand)
        elif op in PRODUCTS or (op in QUOTIENTS and operand is node.args[0]):
            self._scale(node, operand)
        elif op is _aten.slice and operand is node.args[0]:
            self._leave_out(node, operand)
        elif not self._keeps_values(node, operand):
            raise refusal(self._site, node, "needs the softmax to be all that is done to the map")

    def _keeps_values(self, node: fx.Node, operand: fx.Node) -> bool:
        """Whether a node is a copy or a cast of the map, or rids it of the NaN that it has not got."""
        if packet(node) is _aten.nan_to_num:
            return not arguments(node)["nan"]
        return packet(node) in COPIES and operand is node.args[0]

    def _module(self, node: fx.Node) -> None:
        module = self._program.module.get_submodule(str(node.target))
        if type(module) is torch.nn.Dropout:
            self._drop(node, module)
        elif not isinstance(module, torch.nn.Identity):
            raise refusal(self._site, node, f"cannot express what {type(module).__name__} does to the map")

    def _drop(self, node: fx.Node, dropout: float | fx.Node | torch.nn.Dropout) -> None:
        if self._dropout != 0.0:
            raise refusal(self._site, node, "can apply one dropout to the map, not two")
        self._dropout = dropout

    def _zero(self, node: fx.Node, operand: fx.Node) -> None:
        named = arguments(node)
        if packet(node) is _aten.masked_fill:
            condition, other, hides = named["mask"], named["value"], True
        else:
            condition, hides = named["condition"], operand is named.get("other")
            other = named.get("self") if hides else named.get("other")
        if condition is operand or not isinstance(other, (int, float)) or other != 0:
            raise refusal(self._site, node, "needs the softmax to be all that is done to the map")
        self._zeroed.append((condition, hides))

    def _scale(self, node: fx.Node, operand: fx.Node) -> None:
        """A factor of heads or rows; one that has the map's own two dimensions is refused where it is applied."""
        named = arguments(node)
        other = named["other"] if operand is named["self"] else named["self"]
        divides = packet(node) in QUOTIENTS
        if named.get("rounding_mode") or other is operand or sizes(node) != sizes(operand):
            raise refusal(self._site, node, "needs the softmax to be all that is done to the map")
        if isinstance(other, fx.Node):
            own = sizes(other)
            dims = self._layout[len(self._layout) - len(own) :]
            term = tuple(() if size == 1 else dim for dim, size in zip(dims, own, strict=True))
            self._factors.append(Factor(Term(other, without_ones(term)), divides))
        else:
            self._number *= 1 / other if divides else other

    def _leave_out(self, node: fx.Node, operand: fx.Node) -> None:
        """The map without its last key: without a sink, as is checked where one is known."""
        named, before, after = arguments(node), sizes(operand), sizes(node)
        dim = named["dim"] % len(before)
        last = named["start"] in (None, 0) and named["step"] == 1 and before[dim] - after[dim] == 1
        if not last or self._without_sink or self._layout[dim] != self._keys:
            raise refusal(self._site, node, "needs the whole map")
        self._without_sink = True

    def consumer(self, product: Contraction, operand: fx.Node) -> Consumer:
        """What the product makes of the map as it is now."""
        labels, value, value_labels = product.side(operand)
        known = dict(zip(labels, without_ones(self._layout), strict=True))
        if any(known[label] and label not in value_labels and label not in product.axes for label in labels):
            raise refusal(self._site, product.node, "cannot sum the map over axes that the values do not have")

        def layout(names: str, shape: tuple[Any, ...]) -> Layout:
            dims = zip(names, shape, strict=True)
            return without_ones(tuple(known.get(name) or (Part(("channel", name), size),) for name, size in dims))

        own = sizes(value)
        term = layout(value_labels, own)
        term = tuple(() if size == 1 else dim for dim, size in zip(term, own, strict=True))
        channels = tuple(
            part for dim in term for part in dim if isinstance(part.source, tuple) and part.source[0] == "channel"
        )
        result = layout(product.axes, sizes(product.node))
        return Consumer(
            product.node,
            Term(value, term),
            result,
            channels,
            self._dropout,
            tuple(self._zeroed),
            tuple(self._factors),
            self._number,
            self._without_sink,
        )
