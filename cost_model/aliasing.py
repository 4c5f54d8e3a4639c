"""Which operand's storage a result shares: what only makes a view, and what works in place."""

from __future__ import annotations

import copy
import functools

import sympy
import torch
from torch import fx

from .macs import FUSED_ATTENTION
from .sizes import expression, operands, operator_name, product, shape, tensor

Sizes = tuple[sympy.Expr, ...]

#: Operators that are views although their schemas do not say so.
_VIEWS = frozenset({"_unsafe_view", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"})
#: Operators that give back their operand in evaluation mode.
_DROPOUTS = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"})
#: Operators that copy where the memory layout asks for it.
_RESHAPES = frozenset({"reshape", "reshape_as", "flatten", "ravel"})
#: Views that, in the shape of their operand, change nothing.
_SAME_LAYOUT = frozenset(f"aten.{name}" for name in ("view", "reshape", "reshape_as"))
#: Operators that copy where the dtype or the device changes.
_CONVERSIONS = frozenset({"to", "type_as"})


def shared_operand(node: fx.Node, leaf: torch.nn.Module | None = None) -> fx.Node | None:
    """The operand whose storage the result of a call shares; None where the result has storage of its own.

    Arguments:
        node: a call, with ``meta["val"]`` there and at its inputs.
        leaf: the module that a ``call_module`` node calls; it counts as in evaluation mode.
    """
    if leaf is not None:
        first = node.all_input_nodes[0] if node.all_input_nodes else None
        return first if first is not None and _gives_back(leaf, len(shape(first))) else None
    library, _, name = operator_name(node).partition(".")
    if library != "aten" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    given = operands(node)
    first = given[0] if given and isinstance(given[0], fx.Node) else None
    if name in _DROPOUTS:
        return None if given[2] else first
    if name in _CONVERSIONS:
        return first if first is not None and _unchanged(node, first) else None
    if name in _RESHAPES:
        return first if first is not None and is_viewable(shape(first), strides(first), shape(node)) else None
    if name == "contiguous":
        return first if first is not None and strides(first) == contiguous(shape(first)) else None
    return first if name in _VIEWS else _annotated(node.target, given)


def writes_in_place(node: fx.Node) -> bool:
    """Whether a call writes to one of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _annotated(target: torch._ops.OpOverload, given: list[object]) -> fx.Node | None:
    """The operand that the schema of an operator ties its first result to."""
    results = target._schema.returns
    alias = results[0].alias_info if results else None
    for argument, value in zip(target._schema.arguments, given, strict=False):
        mine = argument.alias_info
        if mine is None or not isinstance(value, fx.Node):
            continue
        if "*" in mine.after_set or (alias is not None and mine.before_set & alias.before_set):
            return value
    return None


def _unchanged(node: fx.Node, first: fx.Node) -> bool:
    before, after = tensor(first), tensor(node)
    copies = isinstance(node.target, torch._ops.OpOverload) and any(
        argument.name == "copy" and value is True
        for argument, value in zip(node.target._schema.arguments, operands(node), strict=True)
    )
    return before.dtype == after.dtype and before.device == after.device and not copies


def _gives_back(leaf: torch.nn.Module, ndim: int) -> bool:
    """Whether a module gives back its input in evaluation mode, as Dropout does."""
    if next(leaf.parameters(), None) is not None or next(leaf.children(), None) is not None:
        return False
    twin = copy.copy(leaf)
    twin.training = False
    data = torch.empty((2,) * ndim, device="meta")
    try:
        result = twin.forward(data)
    except Exception:  # whatever it needs, it is no identity
        return False
    return isinstance(result, torch.Tensor) and result.untyped_storage()._cdata == data.untyped_storage()._cdata


def strides(node: fx.Node) -> Sizes:
    """The strides of a node's value, as its kernel lays it out.

    A fused attention lays its result out as its query is: with the heads innermost but one, as models want it, where
    the query comes from a projection. A view in the same shape, which a rewrite may have put behind another kernel than
    it was captured with, is laid out as what it shows.
    """
    name = operator_name(node)
    given = operands(node)
    if name in FUSED_ATTENTION and len(shape(node)) == 4:
        batch, heads, queries, width = shape(node)
        if isinstance(given[0], fx.Node) and strides(given[0]) == contiguous(shape(given[0])):
            return contiguous((batch, heads, queries, width))
        inner = contiguous((batch, queries, heads, width))
        return inner[0], inner[2], inner[1], inner[3]
    if name in _SAME_LAYOUT and isinstance(given[0], fx.Node) and shape(given[0]) == shape(node):
        return strides(given[0])
    if name in ("aten.transpose", "aten.permute"):
        first, *dims = operands(node)
        order = list(range(len(shape(first))))
        if name == "aten.permute":
            order = [order[dim] for dim in dims[0]]
        else:
            order[dims[0]], order[dims[1]] = order[dims[1]], order[dims[0]]
        inner = strides(first)
        return tuple(inner[dim] for dim in order)
    return tuple(expression(step) for step in tensor(node).stride())


def contiguous(sizes: Sizes) -> Sizes:
    """The strides of a contiguous tensor.

    >>> contiguous(sympy.symbols("B T D"))
    (D*T, D, 1)
    """
    return tuple(product(sizes[dim + 1 :]) for dim in range(len(sizes)))


@functools.lru_cache(maxsize=4096)
def is_viewable(sizes: Sizes, steps: Sizes, wanted: Sizes) -> bool:
    """Whether a tensor of these sizes and strides can be seen in another shape without a copy.

    >>> b, t = sympy.symbols("B T")
    >>> two, four, eight = map(sympy.Integer, (2, 4, 8))
    >>> is_viewable((b, t, eight), contiguous((b, t, eight)), (b, t, two, four))
    True
    >>> is_viewable((b, two, t, four), contiguous((b, t, two, four)), (b, two * t, four))
    False
    """
    place, run, taken = len(wanted) - 1, sympy.Integer(1), sympy.Integer(1)
    base = steps[-1] if steps else sympy.Integer(1)
    for dim in reversed(range(len(sizes))):
        run = run * sizes[dim]
        if dim and (sizes[dim - 1] == 1 or _equal(steps[dim - 1], run * base)):
            continue
        while place >= 0 and (wanted[place] == 1 or not _equal(taken, run)):
            taken, place = taken * wanted[place], place - 1
        if not _equal(taken, run):
            return False
        if dim:
            base, run, taken = steps[dim - 1], sympy.Integer(1), sympy.Integer(1)
    return place < 0


def _equal(left: sympy.Expr, right: sympy.Expr) -> bool:
    return left == right or bool(sympy.expand(left - right) == 0)
