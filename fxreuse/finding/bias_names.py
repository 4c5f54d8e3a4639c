"""A few words for what is added to the scores of an attention, as far as the data flow tells."""

from __future__ import annotations

from torch import fx

from .addends import Addends
from .contractions import contraction
from .flow import Flow, value_operands
from .follow import aten, followable, is_elementwise, packet

_GATES = frozenset({aten.mul, aten.multiply})
_DIFFERENCES = frozenset({aten.sub, aten.subtract, aten.rsub})


def bias_name(addends: Addends, flow: Flow) -> str:
    """What biases are: ``none``, ``learned table``, ``relative position``, ``gated relative position`` …

    A table is *relative position* if it is read at differences of input-free positions, *gated* if it is multiplied by
    something that depends on the tokens. ``token-dependent position`` is a product of tokens with something that
    depends on positions only; ``parameters`` and ``token-dependent`` are said where no more is known.
    A ``sink`` is a further score in the softmax; ``mixed heads`` says that parameters mix the scores of the heads.
    """
    names = dict.fromkeys(_name(bias, flow) for bias in addends.biases)
    names |= dict.fromkeys([*["sink"] * bool(addends.sinks), *["mixed heads"] * bool(addends.mixings)])
    return " + ".join(names) or "none"


def _name(node: fx.Node, flow: Flow) -> str:
    node = _main(node, flow)
    if node not in flow.inputs:
        return _free_of_input(node, flow)
    if packet(node) in _GATES:
        tables = [o for o in value_operands(node) if o not in flow.inputs and o in flow.parameters]
        if tables and any(o in flow.inputs for o in value_operands(node)):
            return "gated " + _free_of_input(_main(tables[0], flow), flow)
    if _multiplies_positions(node, flow):
        return "token-dependent position"
    return "token-dependent"


def _main(node: fx.Node, flow: Flow) -> fx.Node:
    """Back through views, casts and everything else that has one operand with parameters in it."""
    while contraction(node) is None:
        ahead = [o for o in value_operands(node) if o in flow.parameters]
        if len(ahead) != 1 or ahead[0].op == "get_attr" or not (followable(node, flow.program) or is_elementwise(node)):
            return node
        node = ahead[0]
    return node


def _free_of_input(node: fx.Node, flow: Flow) -> str:
    if packet(node) not in (aten.embedding, aten.index, aten.index_select, aten.gather):
        return "parameters"
    places = [o for o in value_operands(node) if o not in flow.parameters]
    return "relative position" if any(_has_difference(p) for p in places) else "learned table"


def _has_difference(node: fx.Node) -> bool:
    """Whether an index is made from a difference of two tensors of positions."""
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        operands = value_operands(current)
        if packet(current) in _DIFFERENCES and len(operands) == 2:
            return True
        pending.extend(operands)
    return False


def _multiplies_positions(node: fx.Node, flow: Flow) -> bool:
    """Whether a term is a product of tokens with something input-free, moved into place by views and gathers."""
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        found = contraction(current)
        if found is not None:
            return (found.left in flow.inputs) != (found.right in flow.inputs) and all(
                side.op != "get_attr" and side in flow.parameters for side in (found.left, found.right)
            )
        if current not in seen:
            seen.add(current)
            pending.extend(o for o in value_operands(current) if o in flow.parameters and o in flow.inputs)
    return False
