"""One operator call as the interpreter of index forms sees it: arguments by name, values aligned to the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from .index_bounds import SizeBounds
from .index_forms import Affine, Number, Truth, Unknown, Value
from .index_values import always, substitute


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an ATen operator whose result is one tensor."""

    node: fx.Node
    arguments: Mapping[str, Any]
    values: Mapping[fx.Node, Value]
    bounds: SizeBounds

    @classmethod
    def of(cls, node: fx.Node, values: Mapping[fx.Node, Value], bounds: SizeBounds) -> Call:
        """The call that a node makes, with the arguments that it leaves out at their defaults."""
        assert isinstance(node.target, torch._ops.OpOverload)
        formal = node.target._schema.arguments
        arguments = {argument.name: argument.default_value for argument in formal if argument.has_default_value()}
        arguments.update({argument.name: given for argument, given in zip(formal, node.args, strict=False)})
        arguments.update(node.kwargs)
        return cls(node, arguments, values, bounds)

    @property
    def name(self) -> str:
        """The operator's name without namespace and overload."""
        assert isinstance(self.node.target, torch._ops.OpOverload)
        return self.node.target._schema.name.partition("::")[2]

    @property
    def sizes(self) -> tuple[sympy.Expr, ...]:
        """The sizes of the result."""
        return sizes_of(self.node)

    @property
    def ndim(self) -> int:
        """The number of dimensions of the result."""
        return len(self.sizes)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the result's elements."""
        return self.node.meta["val"].dtype

    def sizes_of(self, name: str) -> tuple[sympy.Expr, ...]:
        """The sizes of an argument; none for a number."""
        argument = self.arguments[name]
        return sizes_of(argument) if is_tensor(argument) else ()

    def dtype_of(self, name: str) -> torch.dtype:
        """The type of an argument's elements; of a number, the one that holds it exactly."""
        argument = self.arguments[name]
        if is_tensor(argument):
            return argument.meta["val"].dtype
        if isinstance(argument, float):
            return torch.float64
        return torch.bool if isinstance(argument, bool) else torch.int64

    def value(self, name: str) -> Value:
        """What is known of an argument, by its own index."""
        argument = self.arguments[name]
        if is_tensor(argument):
            return self.values[argument]
        if isinstance(argument, bool):
            return Truth(argument)
        if isinstance(argument, float):
            return always(Number(argument))
        integer = self.integer(name)
        return Unknown(f"the number {argument}") if integer is None else always(Affine.constant(integer, 0))

    def aligned(self, name: str) -> Value:
        """What is known of an argument, by the index of the result that it is broadcast to."""
        return broadcast(self.value(name), self.sizes_of(name), self.sizes)

    def integer(self, name: str) -> sympy.Expr | None:
        """An integer argument, as an expression of the sizes."""
        return integer_expression(self.arguments[name])

    def dim(self, name: str = "dim") -> int:
        """An argument that names a dimension of ``self``, counted from the front."""
        return int(self.arguments[name]) % max(len(self.sizes_of("self")), 1)


def is_tensor(argument: object) -> bool:
    """Whether an argument is a node whose value is a tensor."""
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor)


def sizes_of(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """The sizes of a node's tensor, as expressions."""
    return tuple(_expression(size) for size in node.meta["val"].shape)


def integer_expression(argument: object) -> sympy.Expr | None:
    """An integer argument (a number, a symbolic size, a node that is one) as an expression of the sizes."""
    if isinstance(argument, fx.Node):
        argument = argument.meta.get("val")
    if isinstance(argument, bool) or not isinstance(argument, (int, torch.SymInt)):
        return None
    return _expression(argument)


def _expression(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def same_size(one: sympy.Expr, other: sympy.Expr) -> bool:
    """Whether two sizes are equal, whatever the symbols are."""
    return bool(one == other or sympy.expand(one - other) == 0)


def broadcast(value: Value, old: Sequence[sympy.Expr], new: Sequence[sympy.Expr]) -> Value:
    """The value of a tensor of sizes ``old`` once broadcast to ``new``: dimensions matched from the right."""
    offset = len(new) - len(old)
    rows: list[Affine | None] = []
    for dim, size in enumerate(old):
        if size == 1:
            rows.append(Affine.constant(0, len(new)))
        else:
            same = same_size(size, new[offset + dim])
            rows.append(Affine.index(offset + dim, len(new)) if same else None)
    return substitute(value, rows, len(new))
