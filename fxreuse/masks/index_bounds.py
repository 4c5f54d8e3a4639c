"""Bounds of affine forms over all admissible indices and all admissible sizes.

The only facts used are ``0 <= i_k < size_k``, and of a size symbol: that it is not negative, and the bounds that the
capture imposed on it (a range, a guard such as ``T <= 4096``), which the program checks when it is called. The lower
bound of 2 that export gives every free size is *not* used: it is an artefact of tracing, and sizes of 1 are run.
A symbol that stands for data (an unbacked one) has no bounds at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
import torch
from torch import fx
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.symbol import SymT, symbol_is_type
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from .index_forms import Affine

#: The lower bound that export gives to every free size, whether or not the model needs it.
EXPORT_LOWER_BOUND = 2


class SizeBounds:
    """What is known of the size symbols of a graph."""

    def __init__(self, ranges: Mapping[sympy.Symbol, ValueRanges]) -> None:
        self._ranges = ranges

    @classmethod
    def of(cls, graph: fx.Graph) -> SizeBounds:
        """The bounds that the capture of this graph imposed."""
        for node in graph.nodes:
            value = node.meta.get("val")
            for size in value.shape if isinstance(value, torch.Tensor) else (value,):
                if isinstance(size, torch.SymInt):
                    return cls(size.node.shape_env.var_to_range)
        return cls({})

    def at_most_zero(
        self, form: Affine, sizes: Sequence[sympy.Expr], existing: Sequence[sympy.Expr] | None = None
    ) -> bool:
        """Whether ``form <= 0`` is certain for every index of a tensor of these sizes; False says nothing.

        An affine form is largest at a corner of the box of indices: at the last index where its coefficient is
        positive, at 0 where it is negative. What remains is an expression of sizes alone, bounded by interval
        arithmetic: sound, and incomplete only where sizes are correlated other than by cancelling.

        Where there is no index there is nothing to prove, so a size of the tensor may be taken to be at least 1;
        ``existing`` are the sizes of which this holds, where they are not ``sizes`` themselves.
        """
        highest = form.const + sum(a * (size - 1) for a, size in zip(form.coeffs, sizes, strict=True) if a > 0)
        highest = sympy.expand(highest)
        if highest.is_Integer:
            return bool(highest <= 0)
        positive = set(sizes if existing is None else existing)
        ranges = {symbol: self._range(symbol, symbol in positive) for symbol in highest.free_symbols}
        return bool(bound_sympy(highest, ranges).upper <= 0)

    def _range(self, symbol: sympy.Symbol, positive: bool) -> ValueRanges:
        if symbol not in self._ranges or symbol_is_type(symbol, SymT.UNBACKED_INT):
            return ValueRanges(1 if positive else -int_oo, int_oo)
        known = self._ranges[symbol]
        lower = known.lower if known.lower > EXPORT_LOWER_BOUND else min(known.lower, 0)
        return ValueRanges(max(lower, int(positive)), known.upper)
