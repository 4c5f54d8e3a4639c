"""What the operators of pruned attentions cost."""

from __future__ import annotations

import sympy
from torch import fx

from ..priors.block_attention import flex_attention_over_blocks, gathered_attention
from ..priors.priors import log_prior
from .macs import formula
from .sizes import product, shape


def _name(function: object) -> str:
    return f"{function.__module__}.{function.__qualname__}"  # type: ignore[attr-defined]


@formula(_name(log_prior))
def _logarithm(node: fx.Node) -> sympy.Expr:
    """Elementwise work is not counted."""
    return sympy.Integer(0)


@formula(_name(gathered_attention), _name(flex_attention_over_blocks))
def _over_blocks(node: fx.Node) -> sympy.Expr:
    """Every pair of a query and a key in the blocks takes the query's width and the value's."""
    query, value = shape(node.args[0]), shape(node.args[2])  # type: ignore[arg-type]
    pairs = node.args[7]
    return product(query[:-3]) * pairs * (query[-1] + value[-1])
