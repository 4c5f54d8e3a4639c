"""Index forms through operators that work element by element: arithmetic, comparison, logic, selection, casts.

Every handler takes a `Call` and returns what is known of its result. Integers are computed symbolically. Floating-point
constants are folded by running the operator itself on one element of the same types, so that rounding, overflow and
type promotion are the operator's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from .index_call import Call, is_tensor
from .index_forms import (
    Affine,
    Cases,
    Formula,
    Leaf,
    Number,
    Truth,
    Unknown,
    Value,
    at_most_zero,
    conjunction,
    disjunction,
    negation,
    select,
)
from .index_values import always, cases, combine, satisfied

Handler = Callable[[Call], Value]

#: The integer types in which positions are computed.
INTEGERS = (torch.int64, torch.int32)

aten = torch.ops.aten


def truth(value: Value) -> Formula:
    """The formula of a value as a bool: numbers are true where they are not 0."""
    if not isinstance(value, Cases):
        return value
    return satisfied(
        lambda leaf: negation(_equals_zero(leaf)) if isinstance(leaf, Affine) else Truth(leaf.value != 0), value
    )


def numbers(value: Value, dtype: torch.dtype, ndim: int) -> Cases | Unknown:
    """A value as elements of an integer or floating-point type."""
    if isinstance(value, Unknown):
        return value
    if isinstance(value, Cases):
        return combine(lambda leaf: _convert(leaf, dtype), value)
    one, zero = (Affine.constant(bit, ndim) if dtype in INTEGERS else Number(float(bit)) for bit in (1, 0))
    return cases([(value, one), (negation(value), zero)])


def cast(value: Value, dtype: torch.dtype, ndim: int) -> Value:
    """A value converted to another element type."""
    return truth(value) if dtype is torch.bool else numbers(value, dtype, ndim)


def _convert(leaf: Leaf, dtype: torch.dtype) -> Leaf | Unknown:
    if isinstance(leaf, Affine):
        if dtype in INTEGERS:
            return leaf
        if leaf.integer is None:
            return Unknown("positions as floating-point numbers")
        return rounded(leaf.integer, dtype)
    if dtype in INTEGERS:
        return Unknown("floating-point numbers as integers")
    return rounded(leaf.value, dtype)


def rounded(number: float, dtype: torch.dtype) -> Number:
    """A number as an element of a floating-point type."""
    exact = torch.float64 if isinstance(number, float) else torch.int64
    with _disable_current_modes():
        return Number(torch.tensor(number, dtype=exact, device="cpu").to(dtype).item())


def _equals_zero(form: Affine) -> Formula:
    return conjunction(at_most_zero(form), at_most_zero(form.times(-1)))


def _add(one: Affine, other: Affine) -> Affine | Unknown:
    return (one + other).bounded()


def _multiply(one: Affine, other: Affine) -> Affine | Unknown:
    for form, factor in ((one, other.integer), (other, one.integer)):
        if factor is not None:
            return form.times(factor).bounded()
    return Unknown("a product of positions")


def arithmetic(call: Call) -> Value:
    """``add``, ``sub``, ``rsub``, ``mul``, ``neg``."""
    operands = [name for name in ("self", "other") if name in call.arguments]
    if call.dtype is torch.bool:
        return _bool_arithmetic(call, operands)
    alpha = call.arguments.get("alpha", 1)
    values = [numbers(call.aligned(name), _number_type(call, name), call.ndim) for name in operands]

    def apply(*leaves: Leaf) -> Leaf | Unknown:
        forms = [leaf for leaf in leaves if isinstance(leaf, Affine)]
        if call.dtype not in INTEGERS or len(forms) < len(leaves):
            return run(call, dict(zip(operands, leaves, strict=True)))
        if not isinstance(alpha, int) or isinstance(alpha, bool):
            return Unknown("a symbolic alpha")
        if call.name in ("neg", "negative"):
            return forms[0].times(-1)
        one, other = forms
        if call.name in ("mul", "multiply"):
            return _multiply(one, other)
        if call.name == "rsub":
            return _add(other, one.times(-alpha))
        return _add(one, other.times(alpha if call.name == "add" else -alpha))

    return _over(apply, values)


def function(call: Call) -> Value:
    """A function of one floating-point number: ``log`` makes a mask to add of one to multiply with."""
    value = numbers(call.aligned("self"), _number_type(call, "self"), call.ndim)
    return _over(lambda leaf: run(call, {"self": leaf}), [value])


def _bool_arithmetic(call: Call, operands: list[str]) -> Value:
    formulas = [truth(call.aligned(name)) for name in operands]
    if call.name in ("mul", "multiply"):
        return conjunction(*formulas)
    if call.name == "add" and call.arguments["alpha"] == 1:
        return disjunction(*formulas)
    return Unknown(f"{call.name} of bools")


def _number_type(call: Call, name: str) -> torch.dtype:
    """The type in which an argument's own elements are held as numbers: bools are counted as integers."""
    dtype = call.dtype_of(name)
    return torch.int64 if dtype is torch.bool else dtype


def _over(function: Callable[..., Leaf | Unknown], values: list[Cases | Unknown]) -> Value:
    known = [value for value in values if isinstance(value, Cases)]
    if len(known) < len(values):
        return next(value for value in values if isinstance(value, Unknown))
    return combine(function, *known)


def run(call: Call, leaves: dict[str, Leaf]) -> Leaf | Unknown:
    """The result of the operator for one element, by running it; only where its operands are plain numbers."""
    elements: dict[fx.Node, tuple[int, float, torch.dtype]] = {}
    for name, leaf in leaves.items():
        number = leaf.value if isinstance(leaf, Number) else leaf.integer
        if number is None:
            return Unknown("positions among floating-point numbers")
        if is_tensor(call.arguments[name]):
            elements[call.arguments[name]] = (len(call.sizes_of(name)), number, call.dtype_of(name))
    if any(node not in elements for node in call.node.all_input_nodes):
        return Unknown("symbolic numbers in floating-point arithmetic")

    def sample(node: fx.Node) -> Any:
        ndim, number, dtype = elements[node]
        return torch.full((1,) * ndim, number, dtype=dtype, device="cpu")

    assert isinstance(call.node.target, torch._ops.OpOverload)
    with _disable_current_modes():
        args, kwargs = fx.node.map_arg((call.node.args, dict(call.node.kwargs)), sample)
        result = call.node.target(*args, **kwargs).item()
    return Affine.constant(int(result), call.ndim) if isinstance(result, int) else Number(result)


COMPARISONS = {
    **{name: name for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{"not_equal": "ne", "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge"},
}


def comparison(call: Call) -> Value:
    """``eq``, ``ne``, ``lt``, ``le``, ``gt``, ``ge``."""
    values = [numbers(call.aligned(name), _number_type(call, name), call.ndim) for name in ("self", "other")]

    def apply(one: Leaf, other: Leaf) -> Formula:
        if isinstance(one, Affine) and isinstance(other, Affine):
            return _compare(COMPARISONS[call.name], one, other)
        result = run(call, {"self": one, "other": other})
        return result if isinstance(result, Unknown) else truth(always(result))

    known = [value for value in values if isinstance(value, Cases)]
    if len(known) < len(values):
        return next(value for value in values if isinstance(value, Unknown))
    return satisfied(apply, *known)


def _compare(operator: str, one: Affine, other: Affine) -> Formula:
    difference = one - other
    if operator in ("eq", "ne"):
        equal = _equals_zero(difference)
        return equal if operator == "eq" else negation(equal)
    if operator in ("le", "gt"):
        at_most = at_most_zero(difference)
        return at_most if operator == "le" else negation(at_most)
    at_least = at_most_zero(difference.times(-1))
    return at_least if operator == "ge" else negation(at_least)


def absolute(call: Call) -> Value:
    """``abs`` of integers."""
    value = call.aligned("self")
    form = value.single if isinstance(value, Cases) else None
    if not isinstance(form, Affine):
        return Unknown("abs of what is not a position")
    negative = negation(at_most_zero(form.times(-1)))
    return cases([(negation(negative), form), (negative, form.times(-1))])


def logic(call: Call) -> Value:
    """``logical_and`` and its like for all types, ``bitwise_and``, ``__and__`` and theirs for bools."""
    operands = [name for name in ("self", "other") if name in call.arguments]
    if not call.name.startswith("logical") and any(call.dtype_of(name) is not torch.bool for name in operands):
        return Unknown("arithmetic on bits")
    formulas = [truth(call.aligned(name)) for name in operands]
    kind = call.name.strip("_").rpartition("_")[2]
    if kind == "not":
        return negation(formulas[0])
    if kind == "and":
        return conjunction(*formulas)
    if kind == "or":
        return disjunction(*formulas)
    return select(formulas[0], negation(formulas[1]), formulas[1])


def choice(call: Call, condition: str, then: str, otherwise: str) -> Value:
    """``then`` where the condition holds, ``otherwise`` elsewhere."""
    formula = truth(call.aligned(condition))
    branches = [cast(call.aligned(name), call.dtype, call.ndim) for name in (then, otherwise)]
    if isinstance(formula, Truth):
        return branches[0 if formula.value else 1]
    first, second = branches
    if not isinstance(first, Cases) and not isinstance(second, Cases):
        return select(formula, first, second)
    if not isinstance(first, Cases) or not isinstance(second, Cases):
        return second if isinstance(first, Cases) else first
    parts = [(conjunction(formula, held), leaf) for held, leaf in first.parts]
    return cases(parts + [(conjunction(negation(formula), held), leaf) for held, leaf in second.parts])


def where(call: Call) -> Value:
    """``where`` of three operands."""
    if "other" not in call.arguments:
        return Unknown("where without values")
    return choice(call, "condition", "self", "other")


def masked_fill(call: Call) -> Value:
    """``masked_fill``: the number where the mask holds."""
    return choice(call, "mask", "value", "self")


def converted(call: Call) -> Value:
    """``to`` and all other ways to copy: the same elements, perhaps of another type."""
    return cast(call.aligned("self"), call.dtype, call.ndim)


HANDLERS: dict[torch._ops.OpOverloadPacket, Handler] = {
    **dict.fromkeys((aten.add, aten.sub, aten.subtract, aten.rsub, aten.mul, aten.multiply), arithmetic),
    **dict.fromkeys((aten.neg, aten.negative), arithmetic),
    **dict.fromkeys((getattr(aten, name) for name in COMPARISONS), comparison),
    **dict.fromkeys((aten.logical_and, aten.logical_or, aten.logical_not, aten.logical_xor), logic),
    **dict.fromkeys((aten.bitwise_and, aten.bitwise_or, aten.bitwise_not, aten.bitwise_xor), logic),
    **dict.fromkeys((aten.__and__, aten.__or__, aten.__xor__), logic),
    **dict.fromkeys((aten.to, aten._to_copy, aten.type_as, aten.clone, aten.contiguous, aten.alias), converted),
    **dict.fromkeys((aten.detach, aten.lift_fresh_copy), converted),
    **dict.fromkeys((aten.abs, aten.absolute), absolute),
    **dict.fromkeys((aten.log, aten.log2, aten.exp, aten.sign), function),
    aten.where: where,
    aten.masked_fill: masked_fill,
}
