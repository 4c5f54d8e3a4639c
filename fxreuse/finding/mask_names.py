"""Names for masks, for people; and keys, by which masks are compared."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import fx

from ..masks.index_forms import AtMostZero, Cases, Every, Formula, Number, Some, Truth, negation
from ..masks.mask_proof import MaskProver
from ..program import Program, get_attribute
from .addends import Mask
from .axes import sizes
from .flow import Flow
from .follow import SAME_VALUE, arguments, aten, packet

_AND = frozenset({aten.bitwise_and, aten.logical_and, aten.__and__, aten.mul})
_OR = frozenset({aten.bitwise_or, aten.logical_or, aten.__or__})
_NOT = frozenset({aten.bitwise_not, aten.logical_not})
_BROADCASTING = frozenset({aten.expand, aten.expand_as, aten.broadcast_to})
_MOVING = _BROADCASTING | {aten.reshape, aten.unsqueeze} | SAME_VALUE
_ARITHMETIC = frozenset({aten.mul, aten.div, aten.sub, aten.rsub, aten.neg, aten.add})

#: Names in the order in which they are put together.
_ORDER = ("causal", "window", "padding", "input", "fixed")


class MaskNames:
    """Names and keys of the masks of a program.

    A mask is ``causal``; a ``window`` (a band around the diagonal, or one side of it); ``padding`` (it depends on an
    input, and only on the key, or only on the query); ``input`` (it depends on an input in any other way); or
    ``fixed`` (it depends on no input). Several joined by *and* are named together: ``causal+padding``.
    """

    def __init__(self, program: Program, flow: Flow, transpose: bool = False) -> None:
        self._program = program
        self._flow = flow
        self._transpose = transpose
        self._found: dict[tuple[fx.Node, bool | None], frozenset[str]] = {}

    @functools.cached_property
    def _prover(self) -> MaskProver:
        return MaskProver(self._program.graph)

    @functools.cached_property
    def transposed(self) -> MaskNames:
        """The same for maps whose last dimension are the queries."""
        return MaskNames(self._program, self._flow, transpose=True)

    def describe(self, masks: tuple[Mask, ...], is_causal: bool) -> str:
        """The name of masks that act together, and of a fused operator's own causal mask."""
        names = {"causal"} if is_causal else set()
        for mask in masks:
            names |= self._names(mask)
        return "+".join(name for name in _ORDER if name in names) or "none"

    def key(self, masks: tuple[Mask, ...], is_causal: bool) -> str:
        """A text that is equal for masks that mask by the same values."""
        keys = {"causal"} if is_causal else set()
        for mask in masks:
            names = self._names(mask)
            proved = mask.plain and (mask.keeps is not None or mask.node not in self._flow.inputs)
            if proved and names <= {"causal"}:
                keys |= names
            else:
                keys.add(f"{mask.number}ᵀ" if self._transpose else mask.number)
        return "+".join(sorted(keys)) or "none"

    def _names(self, mask: Mask) -> frozenset[str]:
        place = (mask.node, mask.keeps)
        if place not in self._found:
            found = self._of_values(mask.node) if mask.keeps is None else self._of_condition(mask.node, mask.keeps)
            self._found[place] = frozenset(found)
        return self._found[place]

    def _of_condition(self, node: fx.Node, keeps: bool) -> Iterator[str]:
        """The names of a condition, part by part."""
        while (self._is_moved(node) or _is_negation(node)) and not self._is_padding(node):
            keeps = keeps != (packet(node) in _NOT)
            node = node.all_input_nodes[0]
        if self._is_padding(node):
            yield "padding"
        elif packet(node) in (_AND if keeps else _OR):
            for operand in filter(_is_tensor, node.all_input_nodes):
                yield from self._of_condition(operand, keeps)
        elif self._prover.constant(node) is not keeps:
            yield from self._of_part(node, keeps)

    def _of_part(self, node: fx.Node, keeps: bool) -> Iterator[str]:
        if node in self._flow.inputs:
            yield "input"
        elif keeps and self._is_triangle(node):
            yield "causal"
        else:
            formula = self._prover.formula_of(node)
            yield from _of_formula(formula if keeps else negation(formula), self._transpose)

    def _of_values(self, node: fx.Node) -> Iterator[str]:
        """The names of values that are added to the scores."""
        while self._is_moved(node) and not self._is_padding(node):
            node = node.all_input_nodes[0]
        named = arguments(node) if node.op == "call_function" and hasattr(node.target, "_schema") else {}
        if node not in self._flow.inputs:
            yield from _of_formula(self._prover.formula_of(node), self._transpose)
        elif self._is_padding(node):
            yield "padding"
        elif packet(node) is aten.where and self._is_zero(named["self"]):
            yield from self._of_condition(named["condition"], True)
        elif packet(node) is aten.where and self._is_zero(named["other"]):
            yield from self._of_condition(named["condition"], False)
        elif packet(node) is aten.masked_fill:
            yield from self._of_condition(named["mask"], False)
            if not self._is_zero(named["self"]):
                yield from self._of_values(named["self"])
        elif packet(node) in _ARITHMETIC:
            for operand in (o for o in node.all_input_nodes if _is_tensor(o) and not self._is_number(o)):
                yield from self._of_values(operand)
        else:
            yield "input"

    def _is_padding(self, node: fx.Node) -> bool:
        """Whether a value depends on an input, and only on the key or only on the query."""
        return node in self._flow.inputs and (len(sizes(node)) < 2 or 1 in sizes(node)[-2:])

    def _is_number(self, node: fx.Node) -> bool:
        return not sizes(node) or self._single(node) is not None

    def _is_zero(self, value: object) -> bool:
        return (self._single(value) if isinstance(value, fx.Node) else value) == 0

    def _single(self, node: fx.Node) -> float | None:
        """The number that all elements of a tensor are, if they are."""
        form = self._prover.forms[node]
        single = form.single if isinstance(form, Cases) else None
        return single.value if isinstance(single, Number) else None

    def _is_moved(self, node: fx.Node) -> bool:
        """Whether a node is another one, broadcast or cast, or reshaped in front of its last two dimensions."""
        if packet(node) not in _MOVING:
            return False
        operand = node.all_input_nodes[0]
        if node in self._flow.inputs or packet(node) in _BROADCASTING:
            return True
        return operand.meta["val"].dtype is torch.bool and sizes(operand)[-2:] == sizes(node)[-2:]

    def _is_triangle(self, node: fx.Node) -> bool:
        """Whether a condition is a constant lower triangle, cut from its first row and column on."""
        while self._is_moved(node) or (packet(node) is aten.slice and arguments(node)["start"] in (0, None)):
            node = node.all_input_nodes[0]
        if self._transpose or node.op != "get_attr":
            return False
        table = get_attribute(self._program.module, str(node.target))
        if not isinstance(table, torch.Tensor) or table.is_meta or table.ndim < 2:
            return False
        return bool((table.bool() == torch.ones_like(table, dtype=torch.bool).tril()).all())


def _of_formula(formula: Formula, transpose: bool) -> Iterator[str]:
    """The names of a formula of the index, whose last two places are those of query and key."""
    if isinstance(formula, Every):
        for part in formula.parts:
            yield from _of_formula(part, transpose)
    elif not _is_certain(formula):
        if not _is_band(formula):
            yield "fixed"
        else:
            yield "causal" if _is_diagonal(formula, key=-2 if transpose else -1) else "window"


def _is_diagonal(formula: Formula, key: int) -> bool:
    """Whether a formula of the distance of key from query is ``key <= query``."""
    return isinstance(formula, AtMostZero) and formula.form.coeffs[key] == 1 and formula.form.const == 0


def _is_certain(formula: Formula) -> bool:
    """Whether a formula is true at every index, seen without regard to sizes: indices are not negative."""
    if not isinstance(formula, AtMostZero):
        return formula == Truth(True)
    form = formula.form
    return max(form.coeffs, default=0) <= 0 and form.const.is_Integer and bool(form.const <= 0)


def _is_band(formula: Formula) -> bool:
    """Whether a formula speaks only of the distance of key from query."""
    if isinstance(formula, (Every, Some)):
        return all(map(_is_band, formula.parts))
    if not isinstance(formula, AtMostZero) or len(formula.form.coeffs) < 2:
        return False
    *rest, query, key = formula.form.coeffs
    return not any(rest) and query == -key and abs(key) == 1


def _is_tensor(value: object) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def _is_negation(node: fx.Node) -> bool:
    operand = node.args[0] if packet(node) in _NOT else None
    return isinstance(operand, fx.Node) and operand.meta["val"].dtype is torch.bool
