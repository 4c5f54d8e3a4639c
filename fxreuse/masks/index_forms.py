"""What an element of an index tensor is, as a function of its position: the vocabulary of mask proofs.

Masks are made of position arithmetic. Here such a tensor is described *exactly*, for every size at once:

* an element of an integer tensor is an `Affine` form ``c + Σ a_k · i_k`` of its own index ``(i_0 … i_n)``: the ``a_k``
  are integers, ``c`` is an expression of the symbolic sizes;
* an element of a bool tensor is a `Formula`: comparisons ``form <= 0`` joined by and / or, negation pushed inwards;
* an element of a tensor that takes a few values by a condition is a `Cases`: ``0.0 where k <= q, -inf elsewhere``.

Whatever cannot be described so is `Unknown`, with the reason. Unknown is a value like any other: ``False & unknown`` is
still False. Nothing in this module approximates: an element that is not Unknown is equal to its description.

>>> query, key = Affine.index(0, 2), Affine.index(1, 2)
>>> print(conjunction(at_most_zero(key - query), negation(at_most_zero(query - key - Affine.constant(3, 2)))))
i1 - i0 <= 0 and i1 - i0 + 4 <= 0
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TypeAlias

import sympy

#: Integers in a form stay below this, so that with sizes of 31 bits no 64-bit arithmetic of the model can have wrapped.
INTEGER_LIMIT = 2**30
#: The same for 32-bit arithmetic at sizes up to 2²⁰.
NARROW_LIMIT = 2**8
#: A formula of more comparisons than this is given up: no mask that anybody writes needs it.
FORMULA_LIMIT = 64


@dataclasses.dataclass(frozen=True)
class Unknown:
    """An element that is not described, and why."""

    reason: str

    def __str__(self) -> str:
        return f"unknown ({self.reason})"


@dataclasses.dataclass(frozen=True)
class Affine:
    """The integer ``const + Σ coeffs[k] · i_k`` at index ``(i_0 … i_n)``."""

    const: sympy.Expr
    coeffs: tuple[int, ...]

    @classmethod
    def constant(cls, value: int | sympy.Expr, ndim: int) -> Affine:
        """The same integer everywhere in a tensor of ``ndim`` dimensions."""
        return cls(sympy.sympify(value), (0,) * ndim)

    @classmethod
    def index(cls, dim: int, ndim: int) -> Affine:
        """The index along one dimension."""
        return cls(sympy.Integer(0), tuple(int(k == dim) for k in range(ndim)))

    def __add__(self, other: Affine) -> Affine:
        return Affine(self.const + other.const, tuple(a + b for a, b in zip(self.coeffs, other.coeffs, strict=True)))

    def __sub__(self, other: Affine) -> Affine:
        return self + other.times(-1)

    def times(self, factor: int) -> Affine:
        """The form, multiplied by an integer."""
        return Affine(sympy.expand(factor * self.const), tuple(factor * a for a in self.coeffs))

    @property
    def is_constant(self) -> bool:
        """Whether it is the same at every index (it may still depend on sizes)."""
        return not any(self.coeffs)

    @property
    def integer(self) -> int | None:
        """The integer that it is, whatever index and sizes; otherwise None."""
        return int(self.const) if self.is_constant and self.const.is_Integer else None

    def bounded(self, limit: int = INTEGER_LIMIT) -> Affine | Unknown:
        """Itself, unless its integers are so large that the model's own arithmetic might have wrapped."""
        integers = (*self.coeffs, *(int(number) for number in self.const.atoms(sympy.Integer)))
        return Unknown("very large integers") if any(abs(i) > limit for i in integers) else self

    def __str__(self) -> str:
        signed = sorted(((a, f"i{k}") for k, a in enumerate(self.coeffs) if a), key=lambda term: term[0] < 0)
        text = "".join(f" {'-' if a < 0 else '+'} {'' if abs(a) == 1 else f'{abs(a)}*'}{name}" for a, name in signed)
        if self.const != 0 or not text:
            const = str(self.const)
            text += f" - {const[1:]}" if const.startswith("-") else f" + {const}"
        return text[3:] if text.startswith(" + ") else f"-{text[3:]}"


@dataclasses.dataclass(frozen=True)
class Number:
    """A floating-point value."""

    value: float


@dataclasses.dataclass(frozen=True)
class Truth:
    """The formula that is always true, or always false."""

    value: bool

    def __str__(self) -> str:
        return str(self.value)


@dataclasses.dataclass(frozen=True)
class AtMostZero:
    """The formula ``form <= 0``."""

    form: Affine

    def __str__(self) -> str:
        return f"{self.form} <= 0"


@dataclasses.dataclass(frozen=True)
class Every:
    """A conjunction."""

    parts: tuple[Formula, ...]

    def __str__(self) -> str:
        return " and ".join(f"({part})" if isinstance(part, Some) else str(part) for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Some:
    """A disjunction."""

    parts: tuple[Formula, ...]

    def __str__(self) -> str:
        return " or ".join(f"({part})" if isinstance(part, Every) else str(part) for part in self.parts)


Leaf: TypeAlias = Affine | Number
Formula: TypeAlias = Truth | AtMostZero | Every | Some | Unknown


@dataclasses.dataclass(frozen=True)
class Cases:
    """A value for each of a few conditions; at every index exactly one of the conditions holds."""

    parts: tuple[tuple[Formula, Leaf], ...]

    @property
    def single(self) -> Leaf | None:
        """The value, if there is only one."""
        return self.parts[0][1] if len(self.parts) == 1 else None


Value: TypeAlias = Formula | Cases


def at_most_zero(form: Affine) -> Formula:
    """The formula ``form <= 0``, decided at once where it is a number.

    >>> print(at_most_zero(Affine(sympy.Integer(-3), (2,))))  # 2·i <= 3 is i <= 1 for an integer i
    i0 - 1 <= 0
    """
    integer = form.integer
    if integer is not None:
        return Truth(integer <= 0)
    divisor = math.gcd(*form.coeffs)
    if divisor > 1 and form.const.is_Integer:
        limit = (-int(form.const)) // divisor
        form = Affine(sympy.Integer(-limit), tuple(a // divisor for a in form.coeffs))
    return AtMostZero(form)


def negation(formula: Formula) -> Formula:
    """The opposite; for integers, ``not form <= 0`` is ``1 - form <= 0``."""
    if isinstance(formula, Truth):
        return Truth(not formula.value)
    if isinstance(formula, AtMostZero):
        return at_most_zero(Affine.constant(1, len(formula.form.coeffs)) - formula.form)
    if isinstance(formula, Every):
        return disjunction(*map(negation, formula.parts))
    if isinstance(formula, Some):
        return conjunction(*map(negation, formula.parts))
    return formula


def conjunction(*parts: Formula) -> Formula:
    """All of them; a False among them decides, whatever the others are."""
    return _join(Every, parts, neutral=True)


def disjunction(*parts: Formula) -> Formula:
    """Any of them; a True among them decides, whatever the others are."""
    return _join(Some, parts, neutral=False)


def _join(kind: type[Every] | type[Some], parts: Sequence[Formula], neutral: bool) -> Formula:
    flat = itertools.chain.from_iterable(part.parts if isinstance(part, kind) else (part,) for part in parts)
    kept = [part for part in dict.fromkeys(flat) if part != Truth(neutral)]
    opposites = (negation(part) for part in kept if isinstance(part, AtMostZero))
    if Truth(not neutral) in kept or any(opposite in kept for opposite in opposites):
        return Truth(not neutral)
    if len(kept) <= 1:
        return kept[0] if kept else Truth(neutral)
    joined = kind(tuple(kept))
    return joined if _weight(joined) <= FORMULA_LIMIT else Unknown("a formula of too many comparisons")


def _weight(formula: Formula) -> int:
    return sum(map(_weight, formula.parts)) if isinstance(formula, (Every, Some)) else 1


def select(condition: Formula, then: Formula, otherwise: Formula) -> Formula:
    """The formula of ``then if condition else otherwise``."""
    if then == otherwise:
        return then
    return disjunction(conjunction(condition, then), conjunction(negation(condition), otherwise))


def substitute_formula(formula: Formula, rows: Sequence[Affine | None], ndim: int) -> Formula:
    """The formula after a change of index: old index ``k`` is ``rows[k]`` of the new index of ``ndim`` dimensions.

    Where a row is None the old index is not described; what depends on it becomes Unknown.
    """
    if isinstance(formula, AtMostZero):
        form = substitute_form(formula.form, rows, ndim)
        return form if isinstance(form, Unknown) else at_most_zero(form)
    if isinstance(formula, (Every, Some)):
        join = conjunction if isinstance(formula, Every) else disjunction
        return join(*(substitute_formula(part, rows, ndim) for part in formula.parts))
    return formula


def substitute_form(form: Affine, rows: Sequence[Affine | None], ndim: int) -> Affine | Unknown:
    """A form after the same change of index."""
    result = Affine.constant(form.const, ndim)
    for coefficient, row in zip(form.coeffs, rows, strict=True):
        if not coefficient:
            continue
        if row is None:
            return Unknown("elements moved in a way that is not affine")
        result = result + row.times(coefficient)
    return result.bounded()
