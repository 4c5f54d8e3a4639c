"""Operators that are attentions by their name, but that this package does not rewrite."""

from __future__ import annotations

import re

from torch import fx

from .flow import FUSED
from .follow import aten, packet

#: Why FlexAttention is not taken.
FLEX_ATTENTION = (
    "FlexAttention is not rewritten: its scores are changed by a function that only its own kernel runs; "
    "build the model with attn_implementation='sdpa' or 'eager', or call scaled_dot_product_attention"
)

_NAME = re.compile(r"(^|_)(attention|attn)(_|$)|^_transformer_encoder_layer_fwd$")


def is_unknown_attention(node: fx.Node) -> bool:
    """Whether a node calls an operator that is called an attention: FlexAttention, a kernel, or one of somebody's own.

    The name is that of the operator, which says what it computes; names of modules play no part.
    """
    return bool(_NAME.search(_name(node))) and packet(node) is not aten.scaled_dot_product_attention


def unknown_attention(node: fx.Node) -> str:
    """Why such an operator is not taken."""
    if _name(node) == "flex_attention":
        return FLEX_ATTENTION
    if packet(node) in FUSED:
        return (
            f"{packet(node)} is the kernel of one device, which decomposing the exported program chose; "
            "pass the program as torch.export.export gives it, without run_decompositions"
        )
    return (
        f"{packet(node)} is an attention whose operands are not known; "
        "build the model with scaled_dot_product_attention or with a softmax and two products"
    )


def _name(node: fx.Node) -> str:
    target = packet(node)
    name = getattr(target, "_qualified_op_name", None) or getattr(target, "__name__", "") or str(target)
    return str(name).rpartition("::")[2].lower()
