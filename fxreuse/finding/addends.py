"""What is added to the product of queries and keys, split into masks and biases.

A mask is a maximal part of the addend, or the condition of a selection, that depends on no parameter. What depends
on one is bias: it belongs to the attention as its projections do.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import fx

from ..program import Program, get_attribute, tensor_inputs
from .axes import sizes
from .contractions import Contraction, contraction
from .flow import Flow, value_operands
from .follow import SAME_VALUE, arguments, aten, followable, is_elementwise, packet
from .softmaxes import is_shift
from .value_numbers import ValueNumbers, digest

_SELECTIONS = frozenset({aten.where, aten.masked_fill})
_JOINING = frozenset({aten.cat, aten.concat})
_SCALINGS = frozenset({aten.mul, aten.multiply, aten.div, aten.divide, aten.true_divide})


@dataclasses.dataclass(frozen=True)
class Mask:
    """A mask: the values that are added, or a condition of which ``keeps`` says what it does where it holds.

    ``keeps`` is None for values; True where the condition lets scores through, False where it replaces them.
    ``number`` is the same for masks that mask by the same values. It is ``plain`` if nothing more is done to it on its
    way to the softmax, and what a condition does not let through gets no weight at all.
    """

    node: fx.Node
    keeps: bool | None
    number: str
    plain: bool


@dataclasses.dataclass(frozen=True)
class Addends:
    """The masks and the biases of an attention.

    ``sinks`` are further scores that take part in the softmax; ``mixings`` are products that mix heads by parameters.
    """

    masks: tuple[Mask, ...]
    biases: tuple[fx.Node, ...]
    sinks: tuple[fx.Node, ...] = ()
    mixings: tuple[fx.Node, ...] = ()


def split_addends(
    top: fx.Node,
    spine: tuple[fx.Node, ...],
    flow: Flow,
    numbers: ValueNumbers,
    axis: int = -1,
    factors: tuple[tuple[fx.Node, bool], ...] = (),
) -> Addends:
    """Masks and biases of the scores ``top``; ``spine`` are the nodes between their product and them.

    For a fused attention ``top`` is its ``attn_mask``, and the spine is empty. ``axis`` is that of the softmax, from
    the last one on; ``factors`` are the masks of its exponentials, each with whether it keeps what it marks.
    """
    splitter = _Splitter(spine, flow, numbers, axis)
    splitter.split(top, ())
    for node, keeps in factors:
        splitter.factor(node, keeps)
    return Addends(tuple(splitter.masks), tuple(splitter.biases), tuple(splitter.sinks), tuple(splitter.mixings))


class _Splitter:
    def __init__(self, spine: tuple[fx.Node, ...], flow: Flow, numbers: ValueNumbers, axis: int) -> None:
        self._product = spine[0] if spine else None
        self._spine = frozenset(spine)
        self._flow = flow
        self._numbers = numbers
        self._axis = axis
        self.masks: list[Mask] = []
        self.biases: list[fx.Node] = []
        self.sinks: list[fx.Node] = []
        self.mixings: list[fx.Node] = []

    def factor(self, node: fx.Node, keeps: bool) -> None:
        """A condition on exponentials, or a factor of them."""
        condition = node
        while packet(condition) in SAME_VALUE:
            condition = value_operands(condition)[0]
        if node in self._flow.parameters:
            self.biases.append(node)
        elif _is_condition(condition):
            self._mask(condition, keeps, ())
        else:
            self._mask(node, None, ("factor",))

    def split(self, node: fx.Node, outer: tuple[str, ...]) -> None:
        """``outer`` are the numbers of what is done to the value on its way to the softmax."""
        flow = self._flow
        if node not in self._spine and node not in flow.parameters:
            self._mask(node, True if _is_condition(node) else None, outer)
            return
        op = packet(node)
        found = contraction(node)
        if node in self._spine and found is not None:
            if found.addend is not None:
                weighted = arguments(node).get("beta", 1) != 1
                self.split(found.addend, (*outer, self._signature(node)) if weighted else outer)
            if node is not self._product:
                self._mixing(node, found, outer)
            return
        if op is aten.add or op is aten.sub or op is aten.subtract:
            self._sum(node, outer)
        elif op in _SELECTIONS and self._condition(node) not in flow.parameters:
            self._selection(node, outer)
        elif node in self._spine or op in SAME_VALUE or (not is_elementwise(node) and followable(node, flow.program)):
            self._transformed(node, outer)
        else:
            self.biases.append(node)

    def _mixing(self, node: fx.Node, found: Contraction, outer: tuple[str, ...]) -> None:
        """Through heads that are mixed by parameters."""
        scores = next((o for o in found.operands[:2] if o in self._spine), None)
        if scores is not None:
            self.mixings.append(node)
            self.split(scores, (*outer, "mixed"))

    def _sum(self, node: fx.Node, outer: tuple[str, ...]) -> None:
        first, second = node.args[:2]
        if isinstance(first, fx.Node) and isinstance(second, fx.Node) and is_shift(second, first, self._axis):
            self.split(first, outer)
            return
        negated = packet(node) is not aten.add or node.kwargs.get("alpha", 1) != 1
        for operand, changed in ((first, False), (second, negated)):
            if isinstance(operand, fx.Node) and isinstance(operand.meta["val"], torch.Tensor):
                self.split(operand, (*outer, self._signature(node)) if changed else outer)

    def _selection(self, node: fx.Node, outer: tuple[str, ...]) -> None:
        """``where`` and ``masked_fill``: the condition is a mask, and of its two values one is the scores."""
        condition = self._condition(node)
        named = arguments(node)
        if packet(node) is aten.masked_fill:
            branches = [(named["self"], False), (named["value"], True)]
        else:
            branches = [(named["self"], True), (named["other"], False)]
        carried = [(value, holds) for value, holds in branches if self._carries(value)]
        fills = [value for value, _ in branches if not self._carries(value)]
        keeps = carried[0][1] if len(carried) == 1 else True
        self._mask(condition, keeps, (*outer, *map(self._fill, fills)))
        for value, _ in carried:
            self.split(value, outer)

    def _carries(self, value: object) -> bool:
        return isinstance(value, fx.Node) and (value in self._spine or value in self._flow.parameters)

    def _fill(self, value: object) -> str:
        """A filling value; the huge negative ones, of which every softmax makes zero, are all one."""
        if isinstance(value, fx.Node):
            number = constant(value, self._flow.program)
            if number is None:
                return self._numbers(value)
            value = number
        assert isinstance(value, (int, float))
        return "drop" if value < -1e9 or math.isinf(value) else repr(float(value))

    def _condition(self, node: fx.Node) -> fx.Node:
        named = arguments(node)
        condition = named["mask"] if packet(node) is aten.masked_fill else named["condition"]
        assert isinstance(condition, fx.Node)
        return condition

    def _transformed(self, node: fx.Node, outer: tuple[str, ...]) -> None:
        """Through an operator on the way to the softmax: it acts on the masks below it."""
        inside = (*outer, self._signature(node)) if packet(node) not in SAME_VALUE else outer
        for operand in tensor_inputs(node):
            if packet(node) in _JOINING and node in self._spine and operand not in self._spine:
                self.sinks.append(operand)
            elif operand in self._spine or (operand in self._flow.parameters and packet(node) not in _SCALINGS):
                self.split(operand, inside)
            elif operand not in self._flow.parameters and packet(node) in _SCALINGS and sizes(operand):
                self._mask(operand, None, (*outer, "factor"))

    def _signature(self, node: fx.Node) -> str:
        """What an operator does, apart from the values that carry scores or parameters."""
        texts = []
        for argument in (*node.args, *(node.kwargs[key] for key in sorted(node.kwargs))):
            if isinstance(argument, fx.Node):
                texts.append("·" if self._carries(argument) else self._numbers(argument))
            elif not isinstance(argument, (list, tuple)):
                texts.append(repr(argument))
        return digest(str(packet(node)), str(sizes(node)), *texts)

    def _mask(self, node: fx.Node, keeps: bool | None, outer: tuple[str, ...]) -> None:
        node, keeps = _without_negation(node, keeps)
        fill = tuple(text for text in outer if text != "drop") if keeps is not None else outer
        number = digest("mask", self._numbers(node), str(keeps), *fill)
        self.masks.append(Mask(node, keeps, number, plain=not fill))


def _is_condition(node: fx.Node) -> bool:
    return node.meta["val"].dtype is torch.bool


def _without_negation(node: fx.Node, keeps: bool | None) -> tuple[fx.Node, bool | None]:
    while keeps is not None and packet(node) in (aten.logical_not, aten.bitwise_not) and _is_condition(node):
        operand = node.args[0]
        if not isinstance(operand, fx.Node) or not _is_condition(operand):
            break
        node, keeps = operand, not keeps
    return node, keeps


def constant(node: fx.Node, program: Program) -> float | None:
    """The number that a node without dimensions is, if it is a constant."""
    while packet(node) in SAME_VALUE:
        node = value_operands(node)[0]
    if packet(node) is aten.full and isinstance(node.args[1], (int, float)):
        return float(node.args[1])
    if node.op != "get_attr" or sizes(node):
        return None
    value = get_attribute(program.module, str(node.target))
    return None if isinstance(value, torch.nn.Parameter) or value.is_meta else float(value)
