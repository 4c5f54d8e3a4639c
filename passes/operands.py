"""What a fused attention needs of the leader of a group: queries, keys, scale and mask, in its own layout."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterable

import torch
from torch import fx

from fxreuse.attention import AttentionSite
from fxreuse.finding.axes import Layout, Part, sizes, start
from fxreuse.finding.contractions import Contraction
from fxreuse.finding.flow import Flow
from fxreuse.finding.follow import packet
from fxreuse.masks.index_call import same_size, sizes_of
from fxreuse.masks.mask_proof import MaskProver
from fxreuse.nodes import inserting_before

from .affine import Addend, Factor, Selection, affine_scores, refusal
from .arrange import Arranger, Insert, Term, without_ones
from .fused import Fused

_aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of a fused attention's four dimensions, and the channels that queries and keys are summed over."""

    batch: tuple[Part, ...]
    heads: tuple[Part, ...]
    queries: tuple[Part, ...]
    keys: tuple[Part, ...]
    channels: tuple[Part, ...]

    @property
    def map(self) -> Layout:
        """The layout of the map and of everything that is added to the scores."""
        return self.batch, self.heads, self.queries, self.keys


@dataclasses.dataclass(frozen=True)
class Attention:
    """An attention as a fused operator computes it, before anything is laid out for it.

    ``layout`` is that of its map, ``layouts`` are all that lead there.
    """

    query: Term
    key: Term
    layout: Layout
    axes: Axes
    number: float
    factors: tuple[Factor, ...] = ()
    addends: tuple[Addend, ...] = ()
    selections: tuple[Selection, ...] = ()
    sink: Addend | None = None
    is_causal: bool = False
    layouts: tuple[Layout, ...] = ()


@dataclasses.dataclass(frozen=True)
class Mask:
    """A mask of a fused attention, and the queries that go with it."""

    query: fx.Node
    node: fx.Node | None
    is_causal: bool


class Operands:
    """The operands of the fused attentions of a group, made where the leader's map is."""

    def __init__(self, site: AttentionSite, node: fx.Node, attention: Attention, prover: MaskProver) -> None:
        self.site, self.node, self.attention, self.axes = site, node, attention, attention.axes
        axes = attention.axes
        self._rows = (axes.batch, axes.heads, axes.queries)
        self._columns = (axes.batch, axes.heads, axes.keys)
        terms = [attention.query, attention.key, *(addend.term for addend in attention.addends)]
        self.arranger = Arranger(attention.layouts, terms)
        with inserting_before(node) as insert:
            query = self.arranger.arrange(insert, attention.query, (*self._rows, axes.channels), full=True)
            key = self.arranger.arrange(insert, attention.key, (*self._columns, axes.channels), full=True)
            self.query, self.key = self._scaled(insert, query, key)
            if attention.sink is not None:
                self.key = with_sink(insert, self.key)
        self._masks: dict[bool, Mask] = {}
        self._prover = prover

    @property
    def terms(self) -> tuple[Term, ...]:
        """Tensors from which the sizes of axes can be read."""
        channels = self.axes.channels
        return Term(self.query, (*self._rows, channels)), Term(self.key, (*self._columns, channels))

    def _scaled(self, insert: Insert, query: fx.Node, key: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Queries and keys with the factors of the scores: each goes to the one that has all its axes."""
        pieces = self.arranger.pieces
        for factor in self.attention.factors:
            own = {piece for dim in factor.term.layout for piece in pieces(dim)}
            if not own & set(pieces(self.axes.keys)):
                query = factor.apply(insert, query, self._as(insert, factor.term, (*self._rows, ())))
            elif not own & set(pieces(self.axes.queries)):
                key = factor.apply(insert, key, self._as(insert, factor.term, (*self._columns, ())))
            else:
                reason = "needs scores of the form α·QKᵀ + β, but they are multiplied by a matrix of their own shape"
                raise refusal(self.site, factor.term.node, reason)
        return query, key

    def _as(self, insert: Insert, term: Term, layout: Layout) -> fx.Node:
        """A tensor laid out so that it broadcasts; a number without dimensions does so as it is."""
        return self.arranger.arrange(insert, term, layout) if term.layout else term.node

    def mask(self, empty_to_zero: bool) -> Mask:
        """What is added to the scores and hides them, as the mask of a fused attention, with the queries that it needs.

        A query all of whose scores the model replaced by one finite number has a uniform map, and no gradient reaches
        its scores. So has a query of zeros that sees all keys. With ``empty_to_zero`` there is no such query.
        """
        if empty_to_zero not in self._masks:
            with inserting_before(self.node) as insert:
                self._masks[empty_to_zero] = self._make_mask(insert, empty_to_zero)
        return self._masks[empty_to_zero]

    def _make_mask(self, insert: Insert, empty_to_zero: bool) -> Mask:
        if self.attention.is_causal:
            return Mask(self.query, None, True)
        sink = self.attention.sink
        final = [empty_to_zero or sink is not None or s.fill == -math.inf for s in self.attention.selections]
        shown = [self._shown(insert, selection) for selection in self.attention.selections]
        strict = _all(insert, [node for node, ends in zip(shown, final, strict=True) if ends])
        soft = _all(insert, [node for node, ends in zip(shown, final, strict=True) if not ends])
        visible = _all(insert, [node for node in (strict, soft) if node is not None])
        kind = "all" if visible is None else self._kind(visible)
        kind = "other" if sink is not None and kind == "causal" else kind
        query, blind = self.query, None
        if kind == "other" and soft is not None:
            blind = insert(_aten.logical_not.default, insert(_aten.any.dim, visible, -1, True))
            visible = _all(insert, [strict, insert(_aten.logical_or.default, soft, blind)])
            query = insert(_aten.masked_fill.Scalar, query, blind, 0.0)
        bias = self._bias(insert)
        if sink is not None:
            return Mask(query, self._with_sink_score(insert, sink, bias, visible if kind == "other" else None), False)
        if bias is None:
            return Mask(query, visible if kind == "other" else None, kind == "causal")
        if blind is not None:
            bias = insert(_aten.masked_fill.Scalar, bias, blind, 0.0)
        if visible is not None and kind != "all":
            bias = insert(_aten.masked_fill.Scalar, bias, insert(_aten.logical_not.default, visible), -math.inf)
        return Mask(query, bias, False)

    def _with_sink_score(self, insert: Insert, sink: Addend, bias: fx.Node | None, visible: fx.Node | None) -> fx.Node:
        """The mask with one more key, which has the sink's score."""
        score = self._weighted(insert, sink)
        keys = insert(_aten.sym_size.int, self.key, -2)
        if bias is None:
            bias = insert(_aten.new_zeros.default, self.query, [1, 1, 1, keys])
        else:
            bias = _with_one_more(insert, bias, -1, 0.0)
        if visible is not None:
            hidden = insert(_aten.logical_not.default, visible)
            hidden = _with_one_more(insert, hidden, -1, False)
            bias = insert(_aten.masked_fill.Scalar, bias, hidden, -math.inf)
        last = insert(_aten.new_zeros.default, self.query, [insert(operator.sub, keys, 1)])
        last = _with_one_more(insert, last, -1, 1.0)
        return insert(_aten.add.Tensor, bias, insert(_aten.mul.Tensor, score, last))

    def _kind(self, mask: fx.Node) -> str:
        """Whether a mask hides nothing (``"all"``), or what ``is_causal`` does (``"causal"``), for all sizes."""
        kind = self._prover.prove(mask).kind
        shape = (*sizes_of(self.query)[-2:-1], *sizes_of(self.key)[-2:-1])
        if kind == "all" or (kind == "causal" and all(map(same_size, sizes_of(mask)[-2:], shape))):
            return kind
        return "other"

    def _bias(self, insert: Insert) -> fx.Node | None:
        total: fx.Node | None = None
        for addend in self.attention.addends:
            made = self._weighted(insert, addend)
            total = made if total is None else insert(_aten.add.Tensor, total, made)
        if total is None:
            return None
        kind = self._kind(total)
        return None if kind == "all" else total

    def _weighted(self, insert: Insert, addend: Addend) -> fx.Node:
        made = self._as(insert, addend.term, self.axes.map)
        for factor in addend.factors:
            made = factor.apply(insert, made, self._as(insert, factor.term, self.axes.map))
        return made if addend.number == 1 else insert(_aten.mul.Tensor, made, addend.number)

    def _shown(self, insert: Insert, selection: Selection) -> fx.Node:
        """Where a selection lets scores through."""
        condition = self._as(insert, selection.condition, self.axes.map)
        return _negation(insert, condition) if selection.hides else condition


def _all(insert: Insert, conditions: Iterable[fx.Node | None]) -> fx.Node | None:
    """Where all conditions hold; None without any."""
    found = [condition for condition in conditions if condition is not None]
    if not found:
        return None
    return functools.reduce(lambda one, other: insert(_aten.logical_and.default, one, other), found)


def _negation(insert: Insert, node: fx.Node) -> fx.Node:
    """The opposite of a condition; of one that is itself an opposite, what that was made of."""
    inner = node.args[0] if packet(node) in (_aten.logical_not, _aten.bitwise_not) else None
    if isinstance(inner, fx.Node) and inner.meta["val"].dtype is torch.bool:
        return inner
    return insert(_aten.logical_not.default, node)


def with_sink(insert: Insert, node: fx.Node) -> fx.Node:
    """Keys or values with one more, of zeros, behind them."""
    return _with_one_more(insert, node, -2, 0.0)


def _with_one_more(insert: Insert, node: fx.Node, dim: int, value: float) -> fx.Node:
    """A tensor with a constant behind its elements along a dimension. (`constant_pad_nd` would fix free sizes.)"""
    made = insert(_aten.full_like.default, insert(_aten.slice.Tensor, node, dim, 0, 1), value)
    return insert(_aten.cat.default, [node, made], dim)


def _operand(product: Contraction, operand: fx.Node) -> Term:
    labels = product.left_axes if operand is product.left else product.right_axes
    return Term(operand, without_ones(start(operand, labels)))


def unfused_attention(site: AttentionSite, softmax: fx.Node, flow: Flow) -> Attention:
    """An unfused attention, read from its softmax.

    Raises:
        UnsupportedError: where its scores are not affine in QKᵀ.
    """
    affine = affine_scores(site, softmax, flow)
    product, query, key = affine.scores.product, affine.scores.query, affine.scores.key
    return Attention(
        _operand(product, query),
        _operand(product, key),
        affine.layout,
        _axes(affine.layout, site.nodes.axis % len(affine.layout), product, query),
        affine.number,
        affine.factors,
        affine.addends,
        affine.selections,
        affine.sink,
        layouts=affine.layouts,
    )


def fused_attention(node: fx.Node) -> Attention:
    """A fused attention, read from its operator."""
    fused = Fused.of(node)
    rank = len(sizes(fused.query))
    shape, width = (*sizes(fused.query)[:-1], sizes(fused.key)[-2]), sizes(fused.query)[-1]
    layout = without_ones(tuple((Part(place, size),) for place, size in enumerate(shape)))
    channels = without_ones(((Part("channels", width),),))[0]
    key = fused.key if sizes(fused.key)[:-2] == shape[:-2] else _per_query_head(node, fused.query, fused.key)
    mask = None if fused.mask is None else Term(fused.mask, _broadcast(layout, fused.mask))
    hides = mask is not None and mask.node.meta["val"].dtype is torch.bool
    return Attention(
        Term(fused.query, (*layout[:-1], channels)),
        Term(key, (*layout[:-2], layout[-1], channels)),
        layout,
        Axes(
            layout[0] if rank > 2 else (),
            tuple(part for dim in layout[1 : rank - 2] for part in dim),
            layout[-2],
            layout[-1],
            channels,
        ),
        fused.factor,
        addends=(Addend(mask, 1.0),) if mask is not None and not hides else (),
        selections=(Selection(mask, False, -math.inf),) if mask is not None and hides else (),
        is_causal=fused.is_causal,
        layouts=(layout,),
    )


def _per_query_head(node: fx.Node, query: fx.Node, key: fx.Node) -> fx.Node:
    """Keys repeated for grouped query heads, as the fused operator does."""
    times = query.meta["val"].shape[-3] // key.meta["val"].shape[-3]
    with inserting_before(node) as insert:
        return insert(_aten.repeat_interleave.self_int, key, times, -3)


def _broadcast(layout: Layout, node: fx.Node) -> Layout:
    """The layout of a tensor that is broadcast to another one's."""
    own = sizes(node)
    dims = layout[len(layout) - len(own) :]
    return tuple(() if size == 1 else dim for dim, size in zip(dims, own, strict=True))


def _axes(layout: Layout, dim: int, product: Contraction, query: fx.Node) -> Axes:
    """Which axes of a map are which: one axis of the queries alone is theirs, all others are batch and heads."""
    labels, _, key_labels = product.side(query)
    rest = [part for place, other in enumerate(layout) if place != dim for part in other]
    own = [part.source for part in rest if part.source in set(labels) - set(key_labels)]
    queries = tuple(part for part in rest if own and part.source == own[-1])
    batched = [
        tuple(part for part in other if part not in queries) for place, other in enumerate(layout) if place != dim
    ]
    batched = [other for other in batched if other]
    channels = without_ones(tuple((part,) for part in _summed(product, query)))
    return Axes(
        batch=batched[0] if batched else (),
        heads=tuple(part for other in batched[1:] for part in other),
        queries=queries,
        keys=layout[dim],
        channels=tuple(part for dim in channels for part in dim),
    )


def _summed(product: Contraction, query: fx.Node) -> list[Part]:
    labels = product.left_axes if query is product.left else product.right_axes
    return [Part(label, size) for label, size in zip(labels, sizes(query), strict=True) if label in product.summed]
