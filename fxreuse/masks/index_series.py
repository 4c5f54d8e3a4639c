"""Index forms of operators that know about position: ranges, constants, triangles, differences and running sums."""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch

from .index_call import Call, broadcast, integer_expression, is_tensor, same_size
from .index_elementwise import INTEGERS, cast, numbers, rounded
from .index_forms import Affine, Cases, Truth, Unknown, Value, at_most_zero, conjunction, negation
from .index_values import always, cases, substitute

Handler = Callable[[Call], Value]

aten = torch.ops.aten


def arange(call: Call) -> Value:
    """``arange`` of integers: ``start + step · i``."""
    start = call.integer("start") if "start" in call.arguments else sympy.Integer(0)
    step = call.arguments.get("step", 1)
    if call.dtype not in INTEGERS or start is None or not isinstance(step, int):
        return Unknown("a range that is not of integers with a constant step")
    return _checked(Affine.index(0, 1).times(step) + Affine.constant(start, 1))


def full(call: Call) -> Value:
    """``full``, ``zeros``, ``ones`` and their ``new_`` and ``_like`` forms."""
    kind = next((kind for kind in ("zeros", "ones") if kind in call.name), None)
    number = {"zeros": 0, "ones": 1, None: None}[kind]
    if number is None:
        number = call.arguments["s" if call.name == "scalar_tensor" else "fill_value"]
    if is_tensor(number):
        return Unknown("a constant read from a tensor")
    if isinstance(number, (bool, int, float)) and call.dtype not in INTEGERS:
        return Truth(bool(number)) if call.dtype is torch.bool else always(rounded(number, call.dtype))
    integer = integer_expression(int(number) if isinstance(number, bool) else number)
    if integer is None or call.dtype not in INTEGERS:
        return Unknown("a constant that is not a number")
    return _checked(Affine.constant(integer, call.ndim))


def _checked(form: Affine) -> Value:
    bounded = form.bounded()
    return bounded if isinstance(bounded, Unknown) else always(bounded)


def triangle(call: Call) -> Value:
    """``tril`` and ``triu``: 0 above or below a diagonal of the last two dimensions."""
    diagonal = call.integer("diagonal")
    if diagonal is None:
        return Unknown("a diagonal that is not a number")
    row, column = (Affine.index(call.ndim - back, call.ndim) for back in (2, 1))
    beyond = column - row - Affine.constant(diagonal, call.ndim)
    kept = at_most_zero(beyond if call.name == "tril" else beyond.times(-1))
    value = call.value("self")
    if not isinstance(value, Cases):
        return conjunction(kept, value)
    zero = numbers(Truth(False), call.dtype, call.ndim)
    assert isinstance(zero, Cases)
    parts = [(conjunction(kept, condition), leaf) for condition, leaf in value.parts]
    return cases([*parts, (negation(kept), zero.parts[0][1])])


def cumsum(call: Call) -> Value:
    """``cumsum`` of a constant ``c``: ``c · (i + 1)`` along the dimension."""
    value = cast(call.value("self"), call.dtype, call.ndim)
    form = value.single if isinstance(value, Cases) else None
    constant = form.integer if isinstance(form, Affine) else None
    if constant is None or call.ndim == 0:
        return Unknown("a running sum of what is not constant")
    dim = call.dim()
    return _checked(Affine.index(dim, call.ndim).times(constant) + Affine.constant(constant, call.ndim))


def diff(call: Call) -> Value:
    """``diff`` of a position: its slope along the dimension, if what is put in front and behind continues the line.

    This is how packed sequences are looked for in position numbers: a difference other than 1 starts a new sequence.
    """
    value = call.value("self")
    form = value.single if isinstance(value, Cases) else None
    if not isinstance(form, Affine) or call.arguments["n"] != 1:
        return Unknown("a difference of what is not a position")
    dim, size = call.dim(), call.sizes_of("self")[call.dim()]
    for name, place in (("prepend", sympy.Integer(-1)), ("append", size)):
        if call.arguments[name] is not None and not _continues(call, name, form, dim, place):
            return Unknown("a difference across a jump")
    return always(Affine.constant(form.coeffs[dim], call.ndim))


def _continues(call: Call, name: str, form: Affine, dim: int, place: sympy.Expr) -> bool:
    """Whether a tensor of size 1 along ``dim`` holds what the form would be at this place."""
    sizes = call.sizes_of(name)
    rest = [k for k in range(call.ndim) if k != dim]
    if sizes[dim] != 1 or not all(same_size(sizes[k], call.sizes[k]) for k in rest):
        return False
    rows = [Affine.index(k, call.ndim) for k in range(call.ndim)]
    rows[dim] = Affine.constant(place, call.ndim)
    return substitute(always(form), rows, call.ndim) == broadcast(call.value(name), sizes, call.sizes)


HANDLERS: dict[torch._ops.OpOverloadPacket, Handler] = {
    **dict.fromkeys((aten.zeros, aten.ones, aten.full, aten.scalar_tensor), full),
    **dict.fromkeys((aten.new_zeros, aten.new_ones, aten.new_full), full),
    **dict.fromkeys((aten.zeros_like, aten.ones_like, aten.full_like), full),
    **dict.fromkeys((aten.tril, aten.triu), triangle),
    aten.arange: arange,
    aten.cumsum: cumsum,
    aten.diff: diff,
}
