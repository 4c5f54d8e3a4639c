"""Index forms of constants: tables of positions, triangles, and numbers that a model keeps from its construction.

A buffer that is saved with the model is data: a checkpoint may hold another one. A buffer that is not saved, and a
constant that the capture lifted out of the code, are what they are, and every element of them is looked at.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from .index_forms import Affine, Formula, Leaf, Number, Truth, Unknown, Value, at_most_zero, negation
from .index_values import always, cases

#: Tables of more elements than this are not looked at.
TABLE_LIMIT = 2**24


def stored(node: fx.Node) -> Value:
    """What is known of a tensor that no operator made: an input, a parameter, a buffer, a constant."""
    kind = {"placeholder": "the input", "get_attr": "the tensor"}.get(node.op, "the result of")
    unknown = Unknown(f"{kind} {node.target}")
    tensor = constant_tensor(node) if node.op == "get_attr" else None
    if tensor is None or isinstance(tensor, FakeTensor) or tensor.is_meta or not 0 < tensor.numel() <= TABLE_LIMIT:
        return unknown
    return table(tensor.detach().cpu()) or unknown


def constant_tensor(node: fx.Node) -> torch.Tensor | None:
    """The tensor that a node reads, if it is one that no checkpoint replaces."""
    module = node.graph.owning_module
    owner, _, name = str(node.target).rpartition(".")
    for part in owner.split(".") if owner else ():
        module = None if module is None else module._modules.get(part)  # type: ignore[assignment]
    if module is None or name in module._parameters:
        return None
    if name in module._buffers and name not in module._non_persistent_buffers_set:
        return None
    tensor = getattr(module, name, None)
    return tensor if isinstance(tensor, torch.Tensor) and not isinstance(tensor, torch.nn.Parameter) else None


def table(tensor: torch.Tensor) -> Value | None:
    """The elements of a tensor as an affine form, or as one or two numbers with a diagonal between them.

    >>> print(table(torch.ones(3, 4, dtype=torch.bool).tril(1)))
    i1 - i0 - 1 <= 0
    >>> print(table(torch.arange(5)).single)
    i0
    >>> print(table(torch.tensor([3, 1, 4])))
    None
    """
    if tensor.dtype in (torch.int64, torch.int32):
        form = _positions(tensor.long())
        if form is not None:
            return always(form)
    if tensor.dtype is not torch.bool and not tensor.is_floating_point() and tensor.dtype is not torch.int64:
        return None
    first = tensor.flatten()[0]
    held = tensor == first
    if bool(held.all()):
        return _choice(tensor, [(Truth(True), first)])
    other = tensor[~held][0]
    formula = _triangle(held) if bool((held | (tensor == other)).all()) else None
    return None if formula is None else _choice(tensor, [(formula, first), (negation(formula), other)])


def _positions(tensor: torch.Tensor) -> Affine | None:
    """The affine form that a table of integers is, if it is one."""
    origin = tensor[(0,) * tensor.ndim]
    made, slopes = origin, []
    for dim, size in enumerate(tensor.shape):
        line = tensor.movedim(dim, -1).reshape(-1, size)[0]
        slopes.append(int(line[1] - line[0]) if size > 1 else 0)
        shape = [-1 if dim == k else 1 for k in range(tensor.ndim)]
        made = made + (torch.arange(size) * slopes[-1]).view(shape)
    if not torch.equal(made.expand(tensor.shape), tensor):
        return None
    form = Affine(Affine.constant(int(origin), 0).const, tuple(slopes)).bounded()
    return form if isinstance(form, Affine) else None


def _triangle(held: torch.Tensor) -> Formula | None:
    """Where a condition that holds at the first element does: below or above a diagonal of the last two dimensions."""
    if held.ndim < 2:
        return None
    row, column = (Affine.index(held.ndim - back, held.ndim) for back in (2, 1))
    square = held[(0,) * (held.ndim - 2)]
    whole = torch.ones_like(square)
    right, down = int(square[0].sum()) - 1, int(square[:, 0].sum()) - 1
    if bool((held == whole.tril(right)).all()):
        return at_most_zero(column - row - Affine.constant(right, held.ndim))
    if bool((held == whole.triu(-down)).all()):
        return at_most_zero(row - column - Affine.constant(down, held.ndim))
    return None


def _choice(tensor: torch.Tensor, parts: list[tuple[Formula, torch.Tensor]]) -> Value:
    """The first part's formula for bools, which is where they are as at the first element; cases for numbers."""
    if tensor.dtype is torch.bool:
        formula, value = parts[0]
        return formula if bool(value) else negation(formula)

    def leaf(value: torch.Tensor) -> Leaf:
        return Number(float(value)) if tensor.is_floating_point() else Affine.constant(int(value), tensor.ndim)

    return cases([(formula, leaf(value)) for formula, value in parts])
