"""Sizes of a graph's tensors as sympy expressions, and the arguments of its calls by name."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx


def expression(size: int | torch.SymInt) -> sympy.Expr:
    """A size as an expression in the symbols of the capture.

    >>> expression(3) + 1
    4
    """
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def shape(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """The shape of a node's value; of the first tensor, where the value is a tuple of several."""
    return tuple(expression(size) for size in tensor(node).shape)


def tensor(node: fx.Node) -> torch.Tensor:
    """The fake tensor that stands for a node's value; the first, where there are several."""
    value = node.meta["val"]
    found: torch.Tensor = value if isinstance(value, torch.Tensor) else value[0]
    return found


def product(sizes: Iterable[sympy.Expr]) -> sympy.Expr:
    """The product of sizes; 1 where there are none.

    >>> product([sympy.Integer(2), sympy.Symbol("T")])
    2*T
    """
    return sympy.Mul(*sizes)


def elements(node: fx.Node) -> sympy.Expr:
    """The number of elements of a node's value."""
    return product(shape(node))


def operator_name(node: fx.Node) -> str:
    """The operator that a node calls, without overload or in-place mark: ``aten.addmm``; empty if it calls none.

    Higher-order operators go by their own name: ``flex_attention``; functions by module and name:
    ``fxreuse.map_workspace.attention_map``.
    """
    target = node.target
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.replace("::", ".")
        return name.removesuffix("_") if target._schema.is_mutable else name
    if isinstance(target, types.FunctionType):
        return f"{target.__module__}.{target.__qualname__}"
    return target.name() if isinstance(target, torch._ops.HigherOrderOperator) else ""


def operands(node: fx.Node) -> list[Any]:
    """The arguments of a call of an operator in the order of its schema, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.args)
    given: list[Any] = list(node.args)
    for argument in node.target._schema.arguments[len(given) :]:
        default = argument.default_value if argument.has_default_value() else None
        given.append(node.kwargs.get(argument.name, default))
    return given
