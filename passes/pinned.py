"""Which tensors have an element type of their own, whatever that of the model is."""

from __future__ import annotations

import torch
from torch import fx

from fxreuse.flow import value_operands
from fxreuse.follow import arguments, packet

_aten = torch.ops.aten

#: Operators whose result has the type of a parameter or of a named operand, so that nothing behind them counts.
_TYPED = frozenset({
    _aten.type_as, _aten.linear, _aten.conv1d, _aten.conv2d, _aten.conv3d, _aten.layer_norm, _aten.rms_norm,
    _aten.embedding, _aten.scaled_dot_product_attention,
})  # fmt: skip


def is_pinned(node: fx.Node) -> bool:
    """Whether a floating-point value comes out of a cast to a fixed type.

    ``(x @ w).float()`` stays float32 in a model that was moved to another type; what is computed from it does, too.
    """
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current.op != "call_function" or packet(current) in _TYPED:
            continue
        if _is_cast(current):
            return True
        operands = [o for o in value_operands(current) if o not in seen and _is_floating(o)]
        seen.update(operands)
        pending.extend(operands)
    return False


def _is_cast(node: fx.Node) -> bool:
    if packet(node) not in (_aten.to, _aten._to_copy):
        return False
    to = arguments(node).get("dtype")
    return isinstance(to, torch.dtype) and to.is_floating_point


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0
