"""Which tensors have an element type of their own, whatever that of the model is."""

from __future__ import annotations

import torch
from torch import fx

from fxreuse.finding.flow import value_operands
from fxreuse.finding.follow import arguments, packet

_aten = torch.ops.aten

#: Operators whose result has the type of a parameter or of a named operand, so that nothing behind them counts.
_TYPED = frozenset({
    _aten.type_as, _aten.linear, _aten.conv1d, _aten.conv2d, _aten.conv3d, _aten.layer_norm, _aten.rms_norm,
    _aten.embedding, _aten.scaled_dot_product_attention,
})  # fmt: skip


def is_pinned(node: fx.Node) -> bool:
    """Whether a floating-point value has a type that is written down in the graph.

    ``(x @ w).float()`` and ``softmax(x, -1, float32)`` stay float32 in a model that was moved to another type, and
    so does what is computed from them.
    """
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if names_type(current):
            return True
        operands = [o for o in typing_operands(current) if o not in seen]
        seen.update(operands)
        pending.extend(operands)
    return False


def names_type(node: fx.Node) -> bool:
    """Whether an operator names a floating-point type for its result."""
    if not isinstance(node.target, torch._ops.OpOverload) or packet(node) in _TYPED:
        return False
    to = arguments(node).get("dtype")
    return isinstance(to, torch.dtype) and to.is_floating_point


def typing_operands(node: fx.Node) -> list[fx.Node]:
    """The operands that decide the type of a floating-point result which the operator does not name.

    A tensor without dimensions decides it only where no floating-point tensor has any.
    """
    if node.op != "call_function" or packet(node) in _TYPED:
        return []
    floating = [operand for operand in value_operands(node) if _is_floating(operand)]
    return [operand for operand in floating if operand.meta["val"].dim() > 0] or floating


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
