"""What is done to a map after its softmax and before it meets the values: suppression and renormalisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from torch import fx

from .axes import sizes
from .contractions import contraction
from .flow import Flow, value_operands
from .follow import SAME_VALUE, VIEWS, aten, is_elementwise, packet
from .value_numbers import ValueNumbers, digest

_CASTS = frozenset({aten.to, aten._to_copy, aten.type_as, aten.clone, aten.contiguous})
_SELECTIONS = frozenset({aten.where, aten.masked_fill, aten.threshold, aten.relu, aten.clamp, aten.clamp_min})
_COMPARISONS = frozenset({aten.lt, aten.le, aten.gt, aten.ge})


@dataclasses.dataclass(frozen=True)
class Suppressed:
    """The map that is contracted with the values.

    ``name`` says in a word what the softmax's value went through, ``number`` is equal for maps that went through the
    same; both are empty where the map is the softmax's value.
    """

    map: fx.Node
    name: str = ""
    number: str = ""


def suppressed(softmax: fx.Node, contexts: Sequence[fx.Node], flow: Flow, numbers: ValueNumbers) -> Suppressed:
    """The last function of a softmax alone through which all that reads it goes.

    Only functions of whole rows count: *weak attention suppression* drops what is below a threshold made from mean and
    deviation of a row, and divides by what remains. What merely scales or drops elements (a head mask, padding) or has
    parameters (mixed heads) belongs to the layer, as its dropout does, and comes after the map.
    """
    last = max(flow.order[context] for context in contexts)
    made = _functions_of(softmax, last, flow, numbers)
    for node in reversed(made):
        if made[node].of_rows and sizes(node) == sizes(softmax) and _all_goes_through(node, softmax, made.keys()):
            drops = any(packet(n) in _SELECTIONS | _COMPARISONS for n in made)
            return Suppressed(node, "suppressed" if drops else "renormalised", made[node].number)
    return Suppressed(softmax)


@dataclasses.dataclass(frozen=True)
class _Function:
    """A function of a softmax: what it does, as a number, and whether it has whole rows for arguments."""

    number: str
    of_rows: bool


def _functions_of(softmax: fx.Node, last: int, flow: Flow, numbers: ValueNumbers) -> dict[fx.Node, _Function]:
    """The values up to the node numbered ``last`` that are made from a softmax and constants, in order of execution."""
    made = {softmax: _Function("·", False)}
    pending = sorted(softmax.users, key=flow.order.__getitem__)
    while pending:
        node = pending.pop(0)
        if node in made or flow.order[node] >= last or not _is_function(node, made.keys(), flow):
            continue
        row = not is_elementwise(node) and packet(node) not in VIEWS | SAME_VALUE
        texts = (_text(argument, made, numbers) for argument in (*node.args, *node.kwargs.values()))
        of_rows = row or any(made[o].of_rows for o in value_operands(node) if o in made)
        made[node] = _Function(digest(str(packet(node)), *texts), of_rows)
        pending = sorted({*pending, *node.users}, key=flow.order.__getitem__)
    return made


def _is_function(node: fx.Node, made: Collection[fx.Node], flow: Flow) -> bool:
    """Whether a node depends on nothing but what is ``made`` and constants; dropout is no such function."""
    if node.op != "call_function" or contraction(node) is not None or packet(node) in SAME_VALUE - _CASTS:
        return False
    return all(o in made or (o not in flow.inputs and o not in flow.parameters) for o in value_operands(node))


def _all_goes_through(node: fx.Node, softmax: fx.Node, made: Collection[fx.Node]) -> bool:
    """Whether whatever is made from a softmax is made from ``node``, which is made from the softmax."""
    seen = {node}
    pending = [softmax]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        if current not in made or not current.users:
            return False
        seen.add(current)
        pending.extend(current.users)
    return True


def _text(argument: object, made: Mapping[fx.Node, _Function], numbers: ValueNumbers) -> str:
    if isinstance(argument, fx.Node):
        return made[argument].number if argument in made else numbers(argument)
    if isinstance(argument, (list, tuple)):
        return "(" + ",".join(_text(each, made, numbers) for each in argument) + ")"
    return repr(argument)
