"""Lengths that follow from others, as people write them."""

from __future__ import annotations

import sympy
from torch.utils._sympy.functions import FloorDiv


def length_text(length: sympy.Expr) -> str:
    """A length that follows from others: ``⌊samples/320⌋ − 1``.

    >>> samples = sympy.Symbol("samples", integer=True, positive=True)
    >>> length_text(FloorDiv(samples - 3, 2) + 1)
    '⌊(samples - 3)/2⌋ + 1'
    """
    floors = {found: sympy.Symbol(_floor_text(found)) for found in length.atoms(FloorDiv)}
    outermost = [floor for floor in floors if not any(floor in other.atoms(FloorDiv) - {other} for other in floors)]
    return str(length.xreplace({floor: floors[floor] for floor in outermost}))


def _floor_text(floor: sympy.Expr) -> str:
    base, divisor = floor.args
    text = length_text(base)
    return f"⌊{f'({text})' if base.is_Add else text}/{divisor}⌋"
