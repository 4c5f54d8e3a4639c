"""Index forms through operators that move elements without changing them: views, slices, broadcasts, gathers.

Each of them says where an element of the result is read from: the index in the source as affine forms of the index in
the result, one per dimension, put into the source's description. A dimension of which this cannot be said is given as
None, and does no harm where the source does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy
import torch
from torch import fx

from .index_call import Call, broadcast, is_tensor, same_size, sizes_of
from .index_forms import Affine, Cases, Unknown, Value
from .index_values import substitute

Handler = Callable[[Call], Value]

aten = torch.ops.aten

Rows = list[Affine | None]


def expand(call: Call) -> Value:
    """``expand`` and ``broadcast_to``."""
    return call.aligned("self")


def reshape(call: Call) -> Value:
    """``view``, ``reshape``, ``unsqueeze``, ``squeeze``, ``flatten`` …: the same elements in the same order.

    The first dimensions of both sides that are equal are the same index, and so are the last ones, by the row-major
    order; dimensions of size 1 have index 0. The rest, split or merged, is not described.
    """
    old, new = call.sizes_of("self"), call.sizes
    sources = [k for k, size in enumerate(old) if size != 1]
    targets = [k for k, size in enumerate(new) if size != 1]
    rows: Rows = [Affine.constant(0, len(new)) if size == 1 else None for size in old]
    for end in (0, -1):
        while sources and targets and same_size(old[sources[end]], new[targets[end]]):
            rows[sources.pop(end)] = Affine.index(targets.pop(end), len(new))
    return substitute(call.value("self"), rows, len(new))


def permute(call: Call) -> Value:
    """``permute``: dimension ``k`` of the result is dimension ``dims[k]`` of the source."""
    order = [int(dim) % call.ndim for dim in call.arguments["dims"]]
    return _permuted(call, order)


def transpose(call: Call) -> Value:
    """``transpose`` of two dimensions."""
    order = list(range(call.ndim))
    if order:
        one, other = call.dim("dim0"), call.dim("dim1")
        order[one], order[other] = order[other], order[one]
    return _permuted(call, order)


def transpose_last(call: Call) -> Value:
    """``t`` and ``mT``: the last two dimensions transposed; a vector as it is."""
    order = list(range(call.ndim))
    return _permuted(call, [*order[:-2], *reversed(order[-2:])])


def _permuted(call: Call, order: Sequence[int]) -> Value:
    rows: Rows = [Affine.index(order.index(dim), call.ndim) for dim in range(call.ndim)]
    return substitute(call.value("self"), rows, call.ndim)


def _identity(call: Call) -> Rows:
    return [Affine.index(dim, call.ndim) for dim in range(call.ndim)]


def slice_(call: Call) -> Value:
    """``slice``: element ``j`` along the dimension is element ``start + step · j``.

    A start beyond the end is clamped to it, but then the result has no element. The end decides only their number.
    """
    rows, dim, step = _identity(call), call.dim(), call.arguments["step"]
    start = sympy.Integer(0) if call.arguments["start"] is None else call.integer("start")
    origin = None if start is None else _from_front(call, start, call.sizes_of("self")[dim])
    if origin is None or not isinstance(step, int):
        rows[dim] = None
    else:
        rows[dim] = Affine.index(dim, call.ndim).times(step) + Affine.constant(origin, call.ndim)
    return substitute(call.value("self"), rows, call.ndim)


def narrow(call: Call) -> Value:
    """``narrow``: a slice by start and length."""
    rows, dim = _identity(call), call.dim()
    start = None if is_tensor(call.arguments["start"]) else call.integer("start")
    origin = None if start is None else _from_front(call, start, call.sizes_of("self")[dim])
    rows[dim] = None if origin is None else Affine.index(dim, call.ndim) + Affine.constant(origin, call.ndim)
    return substitute(call.value("self"), rows, call.ndim)


def select_(call: Call) -> Value:
    """``select``: one index of a dimension, which disappears."""
    dim, index = call.dim(), call.integer("index")
    origin = None if index is None else _from_front(call, index, call.sizes_of("self")[dim])
    rows: Rows = _identity(call)
    rows.insert(dim, None if origin is None else Affine.constant(origin, call.ndim))
    return substitute(call.value("self"), rows, call.ndim)


def _from_front(call: Call, index: sympy.Expr, size: sympy.Expr) -> sympy.Expr | None:
    """An index that may be counted from the back, counted from the front; None where its sign is not certain."""
    if _never_negative(call, index):
        return index
    if _never_negative(call, -index - 1) and _never_negative(call, index + size):
        return index + size
    return None


def _never_negative(call: Call, number: sympy.Expr) -> bool:
    return call.bounds.at_most_zero(Affine(-number, ()), (), call.sizes)


def flip(call: Call) -> Value:
    """``flip``: the index runs backwards along some dimensions."""
    rows = _identity(call)
    for dim in call.arguments["dims"]:
        last = Affine.constant(call.sizes[dim] - 1, call.ndim)
        rows[dim] = last - Affine.index(int(dim) % call.ndim, call.ndim)
    return substitute(call.value("self"), rows, call.ndim)


def index(call: Call) -> Value:
    """``index.Tensor``: the index along some dimensions is read from integer tensors, broadcast against each other.

    Their common dimensions take the place of those that they index if these are neighbours, and otherwise come first.
    """
    old, new = call.sizes_of("self"), call.sizes
    tensors = {dim: node for dim, node in enumerate(call.arguments["indices"]) if node is not None}
    if any(node.meta["val"].dtype not in (torch.int64, torch.int32) for node in tensors.values()):
        return Unknown("an index by a bool tensor")
    if not tensors:
        return call.value("self")
    dims = sorted(tensors)
    common = max(len(node.meta["val"].shape) for node in tensors.values())
    neighbours = dims[-1] - dims[0] + 1 == len(dims)
    first = dims[0] if neighbours else 0
    free = [k for k in range(len(new)) if not first <= k < first + common]
    rows: Rows = []
    for dim in range(len(old)):
        if dim in tensors:
            rows.append(_read_index(call, tensors[dim], old[dim], first, common))
        else:
            rows.append(Affine.index(free.pop(0), len(new)))
    return substitute(call.value("self"), rows, len(new))


def _read_index(call: Call, node: fx.Node, size: sympy.Expr, first: int, common: int) -> Affine | None:
    """The form of an index tensor, by the index of the result; None if it is no position, or its sign not certain."""
    value = broadcast(call.values[node], sizes_of(node), call.sizes[first : first + common])
    form = value.single if isinstance(value, Cases) else None
    if not isinstance(form, Affine):
        return None
    before, after = (0,) * first, (0,) * (call.ndim - first - common)
    moved = Affine(form.const, before + form.coeffs + after)
    if call.bounds.at_most_zero(moved.times(-1), call.sizes):
        return moved
    if call.bounds.at_most_zero(moved + Affine.constant(1, call.ndim), call.sizes):
        return moved + Affine.constant(size, call.ndim)
    return None


HANDLERS: dict[torch._ops.OpOverloadPacket, Handler] = {
    **dict.fromkeys((aten.expand, aten.expand_as, aten.broadcast_to), expand),
    **dict.fromkeys((aten.view, aten.reshape, aten._unsafe_view, aten.view_as, aten.reshape_as), reshape),
    **dict.fromkeys((aten.unsqueeze, aten.squeeze, aten.flatten, aten.unflatten), reshape),
    **dict.fromkeys((aten.transpose, aten.swapaxes), transpose),
    aten.permute: permute,
    **dict.fromkeys((aten.t, aten.mT), transpose_last),
    aten.slice: slice_,
    aten.narrow: narrow,
    aten.select: select_,
    aten.flip: flip,
    aten.index: index,
}
