"""Which pairs of a query and a key the masks of an attention let through that depend on no input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ..attention import AttentionSite
from ..finding.addends import Addends, split_addends
from ..finding.axes import sizes
from ..finding.flow import Flow
from ..finding.follow import EXPANDING, SAME_VALUE, arguments, aten, packet
from ..finding.scores import Scores, find_scores
from ..finding.softmaxes import softmax_of
from ..finding.value_numbers import ValueNumbers
from ..program import Program, get_attribute

_AND = frozenset({aten.bitwise_and, aten.logical_and, aten.__and__})
_OR = frozenset({aten.bitwise_or, aten.logical_or, aten.__or__})
_NOT = frozenset({aten.bitwise_not, aten.logical_not})
_SAME = SAME_VALUE | EXPANDING
# A score that this, or less, is added to leaves no weight.
_HIDDEN = -1e4


def admissible_pairs(
    program: Program, site: AttentionSite, flow: Flow, lengths: tuple[int, int], known: Mapping[sympy.Symbol, int]
) -> Tensor:
    """(queries, keys), False where no input lets the query see the key.

    A part of a mask that depends on an input counts as letting everything through, and so does one that cannot be
    evaluated, or that differs between the samples of a batch.

    Arguments:
        program: the program.
        site: one of its sites.
        flow: the program's dependences.
        lengths: the numbers of queries and keys.
        known: the values of free sizes at these lengths.
    """
    pairs = torch.ones(lengths, dtype=torch.bool)
    if "causal" in site.mask.split("+") and lengths[0] == lengths[1]:
        pairs = pairs.tril()
    if not {"window", "fixed"} & set(site.mask.split("+")) or site.nodes.axis != -1:
        return pairs
    evaluator = _Evaluator(program, flow, known)
    for mask in _addends(program, site, flow).masks:
        found = evaluator.visible(mask.node, mask.keeps)
        if found is not None and found.dim() >= 2:
            found = found.flatten(0, -3).any(0) if found.dim() > 2 else found
            if all(own in (1, length) for own, length in zip(found.shape, lengths, strict=True)):
                pairs = pairs & found
    return pairs


def _addends(program: Program, site: AttentionSite, flow: Flow) -> Addends:
    numbers = ValueNumbers(program)
    if site.fused:
        return split_addends(program.node(str(site.nodes.mask)), (), flow, numbers)
    top = program.node(str(site.nodes.scores))
    dim = len(sizes(top)) + site.nodes.axis
    scores = find_scores(top, dim, flow)
    assert isinstance(scores, Scores), scores  # the site was found by them
    factors = [found.masks for user in program.graph.nodes if (found := _softmax(user)) and found.scores is top]
    return split_addends(top, scores.spine, flow, numbers, site.nodes.axis, factors[0] if factors else ())


def _softmax(node: fx.Node) -> Any:
    return softmax_of(node) if node.op == "call_function" else None


class _Evaluator:
    """The values of nodes that depend on no input, at sizes that are known."""

    def __init__(self, program: Program, flow: Flow, known: Mapping[sympy.Symbol, int]) -> None:
        self._program, self._flow = program, flow
        self._known = {symbol: sympy.Integer(value) for symbol, value in known.items()}
        self._values: dict[fx.Node, Any] = {}

    def visible(self, node: fx.Node, keeps: bool | None) -> Tensor | None:
        """Where a mask lets through, as far as it depends on no input; None where nothing of it can be told.

        ``keeps`` says whether a condition lets through where it is True; it is None for values that are added.
        """
        if node not in self._flow.inputs:
            value = self._value(node)
            if not isinstance(value, Tensor):
                return None
            return value > _HIDDEN if value.dtype != torch.bool else value if keeps is not False else ~value
        operands = [o for o in node.all_input_nodes if isinstance(o.meta["val"], Tensor)]
        op = packet(node)
        if op in _SAME:
            return self.visible(operands[0], keeps)
        if op in _NOT and keeps is not None:
            return self.visible(operands[0], not keeps)
        if (op in _AND and keeps) or (op in _OR and keeps is False) or (op is aten.add and keeps is None):
            return self._all([(operand, keeps) for operand in operands])
        if op is aten.masked_fill and keeps is None:
            named = arguments(node)
            return self._all([(named["self"], None), (named["mask"], False)])
        if op is aten.where and keeps is None:
            named = arguments(node)
            fills = [_is_low(self._number(named["self"])), _is_low(self._number(named["other"]))]
            return self.visible(named["condition"], fills[1]) if fills[0] != fills[1] else None
        return None

    def _all(self, parts: list[tuple[fx.Node, bool | None]]) -> Tensor | None:
        found = [self.visible(node, keeps) for node, keeps in parts]
        known = [value for value in found if value is not None]
        result = known[0] if known else None
        for value in known[1:]:
            result = result & value  # type: ignore[operator]
        return result

    def _number(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            value = None if value in self._flow.inputs else self._value(value)
        return float(value.max()) if isinstance(value, Tensor) and value.numel() else value

    def _value(self, node: fx.Node) -> Any:
        if node not in self._values:
            self._values[node] = self._evaluate(node)
        return self._values[node]

    def _evaluate(self, node: fx.Node) -> Any:
        """The value of a node, or None where it cannot be told."""
        value = node.meta.get("val")
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if isinstance(value, Tensor) and node in self._flow.inputs:  # read for its size alone
            return torch.zeros([self._size(size) for size in value.shape], dtype=value.dtype)
        if node.op == "get_attr":
            found = get_attribute(self._program.module, str(node.target))
            return None if not isinstance(found, Tensor) or found.is_meta else found.detach().cpu()
        if node.op != "call_function":
            return None
        values = {operand: self._value(operand) for operand in node.all_input_nodes}
        if any(found is None for found in values.values()):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: values[operand])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _size(self, size: int | torch.SymInt) -> int:
        """A size: a length as it is known, a batch as in the example."""
        if isinstance(size, int):
            return size
        found = sympy.sympify(size.node.expr).xreplace(self._known)
        return int(found) if found.is_Integer else int(size.node.hint)


def _is_low(value: Any) -> bool:
    return isinstance(value, (int, float)) and value <= _HIDDEN
