"""Softmaxes, whether they are operators or written out as exponentials and their sum."""

from __future__ import annotations

import dataclasses
import operator

from torch import fx

from .axes import sizes
from .flow import value_operands
from .follow import EXPANDING, REGROUPING, SAME_VALUE, arguments, aten, packet

#: Operators that are softmaxes.
SOFTMAX = frozenset({aten.softmax, aten._softmax, aten._safe_softmax, aten.special_softmax})

#: Operators that write ``e`` to the power of their operand.
EXPONENTIAL = frozenset({aten.exp})

_LOG_SOFTMAX = frozenset({aten.log_softmax, aten._log_softmax, aten.special_log_softmax})
_LOG_SUM = frozenset({aten.logsumexp, aten.special_logsumexp})
_MAXIMA = frozenset({aten.amax, aten.max}) | _LOG_SUM
_PRODUCTS = frozenset({aten.mul, aten.multiply})
_QUOTIENTS = frozenset({aten.div, aten.divide, aten.true_divide})
_DIFFERENCES = frozenset({aten.sub, aten.subtract})
_ZEROS = frozenset({aten.zeros_like, aten.new_zeros, aten.zeros})

_COPIES = frozenset({
    aten.clone, aten.contiguous, aten.alias, aten.lift_fresh_copy, aten.to, aten._to_copy, aten.type_as,
}) & SAME_VALUE  # fmt: skip

#: What may be done to a sum of exponentials before it divides them: something is added, and it is kept from zero.
_OF_DENOMINATORS = SAME_VALUE | REGROUPING | EXPANDING | {
    aten.add, aten.clamp, aten.clamp_min, aten.maximum, aten.where, aten.masked_fill,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Softmax:
    """A softmax: ``node`` is its value, ``scores`` what is exponentiated, ``dim`` the axis from the first one on.

    ``masks`` are conditions or factors that act on the exponentials before they are normalised, each with whether it
    keeps (True) or drops (False) what it marks. ``exponential`` is the node that exponentiates, where the softmax is
    not one operator. ``plain`` says that each row sums to 1: nothing was added to the sum of its exponentials, which is
    not kept from zero either, and no dropout comes before it.
    """

    node: fx.Node
    scores: fx.Node
    dim: int
    exponential: fx.Node | None = None
    masks: tuple[tuple[fx.Node, bool], ...] = ()
    plain: bool = True


def softmax_of(node: fx.Node) -> Softmax | None:
    """The softmax whose value a node is, or None.

    Besides the operators these are ``exp(s) / exp(s).sum(dim)`` with whatever is subtracted from ``s`` before, with
    masked exponentials, and with a denominator that something was added to or that is kept from zero;
    ``exp(log_softmax(s))``; and ``exp(s - logsumexp(s))``.
    """
    op = packet(node)
    if op in SOFTMAX:
        scores, dim = node.args[0], arguments(node)["dim"]
        assert isinstance(scores, fx.Node)
        return Softmax(node, scores, dim % len(sizes(node)))
    if op in EXPONENTIAL:
        return _of_logarithm(node)
    if op in _QUOTIENTS or op in _PRODUCTS:
        return _normalised(node)
    return None


def is_shift(node: fx.Node, scores: fx.Node, dim: int) -> bool:
    """Whether a value is a maximum of the scores or the like, one along ``dim``: no softmax notices if it is taken off.

    ``dim`` counts from the last dimension on.
    """
    if sizes(node) and (len(sizes(node)) < -dim or sizes(node)[dim] != 1):
        return False
    reduced = _reduced(node)
    return packet(reduced) in _MAXIMA and _is_same(reduced.args[0], scores)


def is_summed(exponential: fx.Node, dim: int) -> bool:
    """Whether a value is summed over ``dim``, counted from the first one on."""
    return any(packet(user) is aten.sum and _summed_dim(user) == dim for user in exponential.users)


def _of_logarithm(node: fx.Node) -> Softmax | None:
    logarithm = _without_casts(node.args[0])
    if packet(logarithm) in _LOG_SOFTMAX:
        scores, dim = logarithm.args[0], arguments(logarithm)["dim"]
        assert isinstance(scores, fx.Node)
        return Softmax(node, scores, dim % len(sizes(node)), node, plain=_copied(node.args[0]) is logarithm)
    if packet(logarithm) not in _DIFFERENCES:
        return None
    scores, taken_off = logarithm.args[:2]
    if not isinstance(scores, fx.Node) or not isinstance(taken_off, fx.Node):
        return None
    reduced = _reduced(taken_off)
    dim = _single(arguments(reduced)["dim"]) if packet(reduced) in _LOG_SUM else None
    if dim is None:
        return None
    dim %= len(sizes(scores))
    if not is_shift(taken_off, scores, dim - len(sizes(scores))):
        return None
    return Softmax(node, scores, dim, node, plain=_copied(node.args[0]) is logarithm and _copied(taken_off) is reduced)


def _normalised(node: fx.Node) -> Softmax | None:
    """A quotient of exponentials and their sum."""
    for numerator, denominator in _fractions(node):
        found = _exponential(numerator)
        dim = None if found is None else _dim_of_sum(denominator, numerator)
        if found is not None and dim is not None:
            exponential, masks, copied = found
            scores = exponential.args[0]
            assert isinstance(scores, fx.Node)
            plain = copied and _is_plain_sum(denominator, numerator)
            return Softmax(node, scores, dim, exponential, tuple(masks), plain)
    return None


def _fractions(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Numerator and denominator, also of a product with a reciprocal."""
    left, right = node.args[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return []
    if packet(node) in _QUOTIENTS:
        return [(left, right)]
    found = []
    for numerator, factor in ((left, right), (right, left)):
        while packet(factor) in SAME_VALUE:
            factor = value_operands(factor)[0]
        if packet(factor) is aten.reciprocal or (packet(factor) is aten.pow and factor.args[1] == -1):
            found.append((numerator, factor.args[0]))
        elif packet(factor) in _QUOTIENTS and factor.args[0] == 1:
            found.append((numerator, factor.args[1]))
    return [(one, other) for one, other in found if isinstance(other, fx.Node)]


def _exponential(node: fx.Node) -> tuple[fx.Node, list[tuple[fx.Node, bool]], bool] | None:
    """The exponentials behind masked ones, with their masks, and whether nothing but masks and casts is in between."""
    copied, node = _copied(node), _without_casts(node)
    op = packet(node)
    if op in EXPONENTIAL:
        return node, [], copied is node
    ways: list[tuple[object, object, bool]] = []
    if op is aten.masked_fill and _is_zero(node.args[2]):
        ways = [(node.args[0], node.args[1], False)]
    elif op is aten.where and len(node.args) == 3:
        condition, held, otherwise = node.args
        ways = [(held, condition, True)] if _is_zero(otherwise) else [(otherwise, condition, False)] * _is_zero(held)
    elif op in _PRODUCTS:
        ways = [(node.args[0], node.args[1], True), (node.args[1], node.args[0], True)]
    for inner, mask, keeps in ways:
        if isinstance(inner, fx.Node) and isinstance(mask, fx.Node):
            found = _exponential(inner)
            if found is not None:
                return found[0], [*found[1], (mask, keeps)], found[2] and copied is node
    return None


def _dim_of_sum(denominator: fx.Node, numerator: fx.Node) -> int | None:
    """The dimension over which a denominator sums the numerator, if it is the same for all along it."""
    while packet(denominator) in EXPANDING:
        denominator = value_operands(denominator)[0]
    pending = [denominator]
    while pending:
        node = pending.pop()
        dim = _summed_dim(node)
        if dim is not None and _is_same(node.args[0], numerator):
            kept = sizes(denominator)
            return dim if len(kept) == len(sizes(numerator)) and kept[dim] == 1 else None
        if packet(node) in _OF_DENOMINATORS:
            pending.extend(value_operands(node))
    return None


def _is_plain_sum(denominator: fx.Node, numerator: fx.Node) -> bool:
    """Whether a denominator is the sum of the numerator and nothing else."""
    summed = _copied(denominator)
    return packet(summed) is aten.sum and _copied(summed.args[0]) is _copied(numerator)


def _copied(node: object) -> fx.Node:
    """Back through views, copies and casts that pass on values and gradients as they are."""
    assert isinstance(node, fx.Node)
    while packet(node) in _COPIES | REGROUPING | EXPANDING:
        node = value_operands(node)[0]
    return node


def _summed_dim(node: fx.Node) -> int | None:
    """The only dimension that a node sums its operand over, or the absolute values of it."""
    if packet(node) is aten.linalg_vector_norm and arguments(node)["ord"] != 1:
        return None
    if packet(node) is not aten.sum and packet(node) is not aten.linalg_vector_norm:
        return None
    dim = _single(arguments(node).get("dim"))
    return None if dim is None else dim % len(sizes(node.all_input_nodes[0]))


def _single(dims: object) -> int | None:
    """The only one of some dimensions."""
    if isinstance(dims, (list, tuple)):
        dims = dims[0] if len(dims) == 1 else None
    return dims if isinstance(dims, int) else None


def _reduced(node: fx.Node) -> fx.Node:
    """Back through views, casts, and the choice of the first of several results."""
    while packet(node) in SAME_VALUE | REGROUPING | EXPANDING or packet(node) is operator.getitem:
        node = node.all_input_nodes[0]
    return node


def _without_casts(node: object) -> fx.Node:
    assert isinstance(node, fx.Node)
    while packet(node) in SAME_VALUE:
        node = value_operands(node)[0]
    return node


def _is_same(one: object, other: fx.Node) -> bool:
    return isinstance(one, fx.Node) and _without_casts(one) is _without_casts(other)


def _is_zero(value: object) -> bool:
    return packet(value) in _ZEROS if isinstance(value, fx.Node) else value == 0
