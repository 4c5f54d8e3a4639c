"""Read unfused scores as α·QKᵀ + β, the form that a fused attention computes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxreuse.attention import AttentionSite
from fxreuse.errors import UnsupportedError
from fxreuse.finding.addends import constant
from fxreuse.finding.axes import Layout, Part, sizes, start
from fxreuse.finding.flow import Flow
from fxreuse.finding.follow import SAME_VALUE, VIEWS, arguments, packet, transfer
from fxreuse.finding.scores import Scores, find_scores
from fxreuse.finding.softmaxes import softmax_of
from fxreuse.program import source_line

from .arrange import Term, without_ones

_aten = torch.ops.aten

#: Views that move axes and lose nothing; the others of `VIEWS` take a part, or cut the gradient.
MOVES = VIEWS - {_aten.slice, _aten.narrow, _aten.select, _aten.alias, _aten.detach}
#: Copies and casts.
COPIES = frozenset({
    _aten.clone, _aten.contiguous, _aten.alias, _aten.lift_fresh_copy, _aten.to, _aten._to_copy, _aten.type_as,
}) & SAME_VALUE  # fmt: skip

#: Multiplications and divisions, by a number or element by element.
PRODUCTS = (_aten.mul, _aten.multiply)
QUOTIENTS = (_aten.div, _aten.divide, _aten.true_divide)
_DIFFERENCES = (_aten.sub, _aten.subtract, _aten.rsub)

#: From here downwards a score that replaces another one leaves it no weight, at any score that a model has.
HIDDEN = -1e4


@dataclasses.dataclass(frozen=True)
class Factor:
    """A tensor that scores are multiplied with, or divided by."""

    term: Term
    divides: bool

    def apply(self, insert: Any, node: fx.Node, factor: fx.Node) -> fx.Node:
        """``node`` with the factor, whose dimensions are in the order of the node's by now."""
        return insert(_aten.div.Tensor if self.divides else _aten.mul.Tensor, node, factor)


@dataclasses.dataclass(frozen=True)
class Addend:
    """A tensor that is added to the scores, times a number and factors."""

    term: Term
    number: float
    factors: tuple[Factor, ...] = ()


@dataclasses.dataclass(frozen=True)
class Selection:
    """Scores replaced by ``fill``, minus infinity or a huge negative number, where the condition is ``hides``."""

    condition: Term
    hides: bool
    fill: float

    @property
    def absorbs(self) -> bool:
        """Whether the fill stays what it is whatever is added to it."""
        return self.fill <= torch.finfo(torch.float32).min


@dataclasses.dataclass(frozen=True)
class Affine:
    """scores = (number · Π factors) · QKᵀ + Σ addends, then replaced where a selection hides them.

    ``layout`` is that of the softmax's input, in the labels of the product of queries and keys. ``sink`` is the score
    of a key without a value that stands behind all others.
    """

    scores: Scores
    layout: Layout
    number: float
    factors: tuple[Factor, ...]
    addends: tuple[Addend, ...]
    selections: tuple[Selection, ...]
    layouts: tuple[Layout, ...]
    sink: Addend | None = None


def affine_scores(site: AttentionSite, softmax: fx.Node, flow: Flow) -> Affine:
    """The affine form of an unfused site's scores.

    Followed from the product to the softmax: views, casts, factors, sums, and selections (``where``, ``masked_fill``)
    that leave nothing of a score. A softmax that is written out as exponentials over their sum is one, too.

    Raises:
        UnsupportedError: where the scores are anything else (a tanh soft-cap, say); operator and line are named.
    """
    found = softmax_of(softmax)
    if found is None or not found.plain:
        what = "is suppressed or renormalised after it" if found is None else "has rows that do not sum to 1"
        raise refusal(site, softmax, f"needs a map that is the value of a softmax, but this one {what}")
    scores = find_scores(found.scores, found.dim, flow)
    assert not isinstance(scores, str), scores  # it was found before
    reader = _Reader(site, scores, flow)
    for operand, node in itertools.pairwise(scores.spine):
        reader.step(node, operand)
    for mask, keeps in found.masks:
        reader.mask_exponentials(softmax, mask, keeps)
    return reader.result()


class _Reader:
    """What the value of a node on the way from the product to the softmax is, node by node."""

    def __init__(self, site: AttentionSite, scores: Scores, flow: Flow) -> None:
        self._site, self._scores, self._flow = site, scores, flow
        self._layout = start(scores.product.node, scores.product.axes)
        self._layouts = [self._layout]
        self._number = 1.0
        self._factors: list[Factor] = []
        self._addends: list[Addend] = []
        self._selections: list[Selection] = []
        self._sink: Addend | None = None
        self._fresh = itertools.count()
        product = scores.product
        labels, _, others = product.side(scores.query)
        self._keys = {label for label in product.axes if label in others and label not in labels}
        named = arguments(product.node)
        self._number = float(named.get("alpha", 1.0))
        if product.addend is not None:
            self._add(product.addend, float(named.get("beta", 1.0)))

    def result(self) -> Affine:
        return Affine(
            self._scores,
            without_ones(self._layout),
            self._number,
            tuple(self._factors),
            tuple(self._addends),
            tuple(self._selections),
            tuple(self._layouts),
            self._sink,
        )

    def step(self, node: fx.Node, operand: fx.Node) -> None:
        """From the value of ``operand`` to that of ``node``, which reads it."""
        op = packet(node)
        if op in MOVES:
            self._move(node, operand)
            return
        if op in COPIES and operand is node.args[0]:
            return
        if op in (_aten.cat, _aten.concat):
            self._concatenate(node, operand)
            return
        if node.all_input_nodes.count(operand) != 1 or node.op != "call_function" or list(node.args).count(operand) > 1:
            raise self._refusal(node)
        self._broadcast(node, operand)
        named = arguments(node)
        if op is _aten.neg:
            self._scale(node, -1.0)
        elif op in PRODUCTS or (op in QUOTIENTS and operand is node.args[0] and not named.get("rounding_mode")):
            self._scale(node, named["other"] if operand is node.args[0] else named["self"], op in QUOTIENTS)
        elif op is _aten.add or op in _DIFFERENCES:
            self._sum(node, operand, named)
        elif op in (_aten.masked_fill, _aten.where):
            self._select(node, operand, named)
        else:
            raise self._refusal(node)

    def _move(self, node: fx.Node, operand: fx.Node) -> None:
        layout = transfer(node, operand, self._layout, self._flow.program)
        if layout is None:
            raise self._refusal(node, "the axes of its scores cannot be followed")
        self._layout = tuple(tuple(self._named(part) for part in dim) for dim in layout)
        self._layouts.append(self._layout)

    def _broadcast(self, node: fx.Node, operand: fx.Node) -> None:
        """The layout at an elementwise operator: other dimensions in front, and for those of size 1."""
        before, after = sizes(operand), sizes(node)
        extra = len(after) - len(before)
        aligned = (*((),) * extra, *self._layout)
        pairs = zip(aligned, (*(1,) * extra, *before), after, strict=True)
        self._layout = tuple(
            (self._named(Part(None, new)),) if old == 1 and new != 1 else dim for dim, old, new in pairs
        )
        self._layouts.append(self._layout)

    def _named(self, part: Part) -> Part:
        """An axis that the product does not have, under a name of its own."""
        source = ("broadcast", next(self._fresh)) if part.source is None and part.size != 1 else part.source
        return dataclasses.replace(part, source=source)

    def _term(self, node: fx.Node) -> Term:
        """A tensor that is combined element by element with the scores, as they are now."""
        own = sizes(node)
        dims = self._layout[len(self._layout) - len(own) :]
        return Term(node, without_ones(tuple(() if size == 1 else dim for dim, size in zip(dims, own, strict=True))))

    def _scale(self, node: fx.Node, by: Any, divides: bool = False) -> None:
        number = self._as_number(by)
        if self._selections and (number is None or number <= 0):
            raise self._refusal(node, "its scores are masked first and scaled then")
        if number is not None:
            number = 1 / number if divides else number
            self._number *= number
            self._change(lambda a: dataclasses.replace(a, number=a.number * number))
            self._selections = [dataclasses.replace(s, fill=s.fill * number) for s in self._selections]
            return
        factor = Factor(self._term(by), divides)
        self._factors.append(factor)
        self._change(lambda a: dataclasses.replace(a, factors=(*a.factors, factor)))

    def _change(self, change: Callable[[Addend], Addend]) -> None:
        self._addends = [change(addend) for addend in self._addends]
        self._sink = None if self._sink is None else change(self._sink)

    def _sum(self, node: fx.Node, operand: fx.Node, named: dict[str, Any]) -> None:
        first, second = named["self"], named["other"]
        alpha = float(named["alpha"])
        weights = [1.0, alpha if packet(node) is _aten.add else -alpha]
        if packet(node) is _aten.rsub:
            weights = [-alpha, 1.0]
        own, other = (0, 1) if operand is first else (1, 0)
        if weights[own] != 1:
            self._scale(node, weights[own])
        if self._is_constant_for_all_keys((first, second)[other]):
            return
        if self._sink is not None:
            raise self._refusal(node, "something is added to its scores behind a sink")
        if not all(selection.absorbs for selection in self._selections):
            raise self._refusal(node, "something is added to scores that were replaced by a number")
        self._add((first, second)[other], weights[other])

    def _add(self, value: Any, weight: float) -> None:
        """Something added to the scores; a number, the same for every key, does not change their softmax."""
        if isinstance(value, fx.Node) and weight != 0:
            self._addends.append(Addend(self._term(value), weight))

    def _is_constant_for_all_keys(self, value: Any) -> bool:
        """Whether a term was made of the scores and is the same for all keys, as their maximum: a softmax drops it.

        What was not made of the scores stays, as a mask of whole rows has numbers that swallow the scores.
        """
        if not isinstance(value, fx.Node):
            return True
        sources = {part.source for dim in self._term(value).layout for part in dim}
        return not sources & self._keys and self._scores.product.node in behind(value)

    def _concatenate(self, node: fx.Node, operand: fx.Node) -> None:
        """Scores and, behind them, the score of one key that has no value: an attention sink."""
        tensors, dim = arguments(node)["tensors"], arguments(node)["dim"]
        own = {part.source for part in self._layout[dim]}
        if len(tensors) != 2 or tensors[0] is not operand or own != self._keys or sizes(tensors[1])[dim] != 1:
            raise self._refusal(node)
        if self._sink is not None or len(self._layout[dim]) != 1:
            raise self._refusal(node)
        self._sink = Addend(self._term(tensors[1]), 1.0)

    def _select(self, node: fx.Node, operand: fx.Node, named: dict[str, Any]) -> None:
        if packet(node) is _aten.masked_fill:
            condition, fill, hides = named["mask"], named["value"], True
            carried = operand is named["self"]
        else:
            condition, hides = named["condition"], operand is named.get("other")
            fill = named.get("self") if hides else named.get("other")
            carried = hides or operand is named.get("self")
        number = self._as_number(fill)
        if self._sink is not None:
            raise self._refusal(node, "its scores are masked behind a sink")
        if not carried or number is None or not number <= HIDDEN:
            what = "another tensor" if number is None else str(number)
            raise self._refusal(node, f"it replaces scores by {what}, which does not rule them out")
        finite = {s.fill for s in self._selections if s.fill != -math.inf} - {number}
        if finite and number != -math.inf:
            raise self._refusal(node, f"its scores are replaced by {finite.pop():.3g} and by {number:.3g}")
        self._selections.append(Selection(self._term(condition), hides, number))

    def mask_exponentials(self, softmax: fx.Node, mask: fx.Node, keeps: bool) -> None:
        """A condition that leaves nothing of an exponential, as minus infinity in its score does."""
        while packet(mask) in COPIES:
            mask = mask.args[0]  # type: ignore[assignment]
        if mask.meta["val"].dtype is not torch.bool or sizes(softmax) != sizes(self._scores.spine[-1]):
            raise self._refusal(softmax, f"its exponentials are multiplied with {mask.name}, which is no condition")
        self._selections.append(Selection(self._term(mask), not keeps, -math.inf))

    def _as_number(self, value: Any) -> float | None:
        """The number that a value is: none for a buffer, whose content is the model's state."""
        if isinstance(value, (int, float)):
            return float(value)
        if not isinstance(value, fx.Node) or not isinstance(value.meta["val"], torch.Tensor) or sizes(value):
            return None
        source = value
        while packet(source) in COPIES:
            source = source.args[0]  # type: ignore[assignment]
        if source.op == "get_attr" and str(source.target) in dict(self._flow.program.module.named_buffers()):
            return None
        return constant(value, self._flow.program)

    def _refusal(
        self, node: fx.Node, reason: str = "its scores go through an operator that is no factor, sum or mask"
    ) -> UnsupportedError:
        return refusal(self._site, node, f"needs scores of the form α·QKᵀ + β, but {reason}")


def behind(node: fx.Node) -> set[fx.Node]:
    """A node and everything that it is made of."""
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in seen:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return seen


def refusal(site: AttentionSite, node: fx.Node, reason: str) -> UnsupportedError:
    """The error that ``lowering=recompute`` cannot express a site, with the node at fault and its line."""
    line = source_line(node)
    where = f"{node.name}: {node.target}" + (f", {line}" if line else "")
    return UnsupportedError(f"{site}: lowering=recompute {reason} ({where}). Use lowering=materialize for this stack.")
