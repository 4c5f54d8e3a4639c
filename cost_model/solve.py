"""From the sizes that a person names to the symbols of the capture."""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from ..errors import InputError

_LARGEST = 1 << 40


def solve(wanted: Iterable[tuple[str, sympy.Expr, int]]) -> dict[sympy.Symbol, int]:
    """The symbols for which every expression has its value.

    An expression with one unknown symbol is taken to grow with it; of several values that fit, the smallest is taken.

    Arguments:
        wanted: triples of the name of a size, its expression, and its value.

    Raises:
        InputError: where two sizes contradict each other, or no value fits.

    >>> t = sympy.Symbol("t", integer=True, positive=True)
    >>> solve([("frames", sympy.floor(t / 320), 499)])
    {t: 159680}
    """
    known: dict[sympy.Symbol, int] = {}
    by: dict[sympy.Symbol, str] = {}
    for name, expression, value in sorted(wanted, key=lambda entry: not entry[1].is_Symbol):
        rest = expression.xreplace({symbol: sympy.Integer(size) for symbol, size in known.items()})
        if rest.is_Integer:
            if rest != value:
                causes = sorted({by[symbol] for symbol in expression.free_symbols})
                cause = f"fixed by {', '.join(causes)}" if causes else "what the capture fixed"
                raise InputError(f"{name} = {value} does not fit: it is {rest}, {cause}. Leave it out or capture anew.")
        elif len(rest.free_symbols) == 1:
            (symbol,) = rest.free_symbols
            known[symbol] = _invert(name, rest, symbol, value)
            by[symbol] = name
        else:
            raise InputError(
                f"{name} = {value} does not decide {expression}, which has several free sizes. Give those themselves."
            )
    return known


def _invert(name: str, expression: sympy.Expr, symbol: sympy.Symbol, value: int) -> int:
    """The smallest size for which an expression that grows with it has a value."""

    def at(size: int) -> sympy.Expr:
        return expression.xreplace({symbol: sympy.Integer(size)})

    if expression.is_Symbol:
        return value
    low, high = 0, 1
    while high < _LARGEST and at(high) < value:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < value else (low, middle)
    if at(high) != value:
        raise InputError(f"{name} = {value} does not fit: no size gives it. Near it is {name} = {at(high)}.")
    return high
