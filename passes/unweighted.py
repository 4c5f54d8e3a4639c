"""Scores without their prior: what else is added to them, and where they are hidden."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import torch
from torch import fx

from fxreuse.finding.follow import EXPANDING, REGROUPING, SAME_VALUE, VIEWS, arguments, packet
from fxreuse.map_workspace import attention_map
from fxreuse.nodes import inserting_before

from .arrange import Insert
from .fused import OPERATOR

_aten = torch.ops.aten
_VIEWS = (VIEWS | REGROUPING | EXPANDING) - {_aten.detach, _aten.alias}
#: What makes a map of a mask that is one of its arguments.
MAPS = (OPERATOR, attention_map)


@dataclasses.dataclass(frozen=True)
class Unweighted:
    """A value that had a prior added, in parts: ``rest`` is what is left of it, None for zeros.

    ``cut`` is to be added where the prior cuts, in its layout: 0 for scores that are kept, minus infinity for others.
    ``hidden`` are conditions under which scores are hidden by something else. ``triangle`` says that a causal mask was
    left out, which ``cut`` stands for.
    """

    rest: fx.Node | None
    cut: fx.Node
    hidden: tuple[fx.Node, ...] = ()
    triangle: bool = False

    def mask(self, insert: Insert, with_cut: bool = True) -> fx.Node | None:
        """The same as a mask of a fused attention, None for none: boolean where nothing is added to the scores.

        What is cut is added, not a condition: a kernel that adds its mask would make numbers of it at every call.
        """
        terms = [node for node in (self.rest, self.cut if with_cut else None) if node is not None]
        if not terms:
            shown = [_opposite(insert, node) for node in self.hidden]
            return functools.reduce(functools.partial(insert, _aten.logical_and.default), shown) if shown else None
        mask = functools.reduce(functools.partial(insert, _aten.add.Tensor), terms)
        for condition in self.hidden:
            mask = insert(_aten.masked_fill.Scalar, mask, condition, -math.inf)
        return mask


def _opposite(insert: Insert, node: fx.Node) -> fx.Node:
    inner = node.args[0] if packet(node) is _aten.logical_not else None
    if isinstance(inner, fx.Node) and inner.meta["val"].dtype is torch.bool:
        return inner
    return insert(_aten.logical_not.default, node)


def follow_prior(logarithm: fx.Node, cut: fx.Node, causal: bool) -> dict[fx.Node, Unweighted]:
    """Every value that a prior's logarithm was added to, on its way to the attention maps, without it.

    Arguments:
        logarithm: what the prior adds.
        cut: a value of the same shape, 0 or minus infinity, to be added where the prior cuts.
        causal: whether ``cut`` hides what a causal mask does.
    """
    found = {logarithm: Unweighted(None, cut)}
    for node in _behind(logarithm):
        parts = _step(node, found, causal)
        if parts is not None:
            found[node] = parts
    return found


def _behind(source: fx.Node) -> Iterator[fx.Node]:
    """The nodes that are made of one, in order of execution, up to the maps."""
    reached = {source}
    for node in list(source.graph.nodes):
        is_map = node.op != "call_function" or node.target in MAPS
        if not is_map and any(operand in reached for operand in node.all_input_nodes):
            reached.add(node)
            yield node


def _step(node: fx.Node, found: dict[fx.Node, Unweighted], causal: bool) -> Unweighted | None:
    """A node without the prior, if it is one that masks are made with."""
    known = [operand for operand in node.all_input_nodes if operand in found]
    op = packet(node)
    if len(known) != 1:
        return None
    (operand,) = known
    before = found[operand]
    if op in SAME_VALUE and node.args[0] is operand:
        return _mapped(node, operand, before, same=True)
    if op in _VIEWS and node.args[0] is operand:
        return _mapped(node, operand, before, same=False)
    if op is _aten.masked_fill and node.args[0] is operand and node.args[2] == -math.inf:
        condition = node.args[1]
        assert isinstance(condition, fx.Node)
        if causal and packet(condition) is _aten.triu and condition.args[1:] == (1,):
            return dataclasses.replace(before, triangle=True)
        return dataclasses.replace(before, hidden=(*before.hidden, condition))
    if op is _aten.add and arguments(node).get("alpha", 1) == 1:
        other = next(argument for argument in node.args[:2] if argument is not operand)
        return _plus(node, before, other) if isinstance(other, fx.Node) else None
    return None


def _plus(node: fx.Node, before: Unweighted, other: fx.Node) -> Unweighted:
    if before.rest is None:
        return dataclasses.replace(before, rest=other)
    with inserting_before(node) as insert:
        return dataclasses.replace(before, rest=insert(_aten.add.Tensor, before.rest, other))


def _mapped(node: fx.Node, operand: fx.Node, before: Unweighted, same: bool) -> Unweighted:
    """What a view or a cast makes of the parts; conditions are not cast."""
    with inserting_before(node) as insert:

        def again(value: fx.Node) -> fx.Node:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda a: value if a is operand else a)
            return insert(node.target, *args, **kwargs)

        rest = None if before.rest is None else again(before.rest)
        hidden = before.hidden if same else tuple(map(again, before.hidden))
        return Unweighted(rest, again(before.cut), hidden, before.triangle)
