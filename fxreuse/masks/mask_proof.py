"""Proofs that an attention mask is trivial: all true, or plainly causal, for every size that the program accepts.

Masks are never sampled: a window of 4096 looks causal on every sequence that one would care to try. A mask's formula
(`index_forms`) is decided on two regions, *lower* (key index <= query index) and *upper* (key index > query index),
which together are all of the map:

* true on both: every key is visible to every query, the mask does nothing;
* true on lower and false on upper: it is the causal mask, aligned at the top left as ``is_causal`` is.

A comparison is true on a region if its form is bounded so there. To bound it, the region is described by one or more
*charts*, changes of index that turn it into a box or into part of one: on lower, ``query = key + d`` with
``0 <= d < queries``. What holds on a box that covers the region holds on the region. A conjunction is true if all its
parts are, false if one is; a disjunction the other way round. Every step is sound, none is complete: a mask of which
nothing can be shown is left alone.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

import sympy
import torch
from torch import fx

from .index_bounds import SizeBounds
from .index_call import sizes_of
from .index_forms import (
    Affine,
    Cases,
    Every,
    Formula,
    Number,
    Some,
    Truth,
    Unknown,
    disjunction,
    negation,
    substitute_formula,
)
from .index_interpreter import IndexForms


@dataclasses.dataclass(frozen=True)
class Proof:
    """What was proved of a mask, and why it holds or what was in the way."""

    kind: Literal["all", "causal", "none-provable"]
    reason: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """A change of index: the old index as forms of a new one, and the sizes of the box that the new one is in."""

    rows: tuple[Affine, ...]
    sizes: tuple[sympy.Expr, ...]


Region: TypeAlias = tuple[Chart, ...]


def whole(sizes: tuple[sympy.Expr, ...]) -> Region:
    """All indices of a tensor."""
    return (Chart(tuple(Affine.index(k, len(sizes)) for k in range(len(sizes))), sizes),)


def lower(sizes: tuple[sympy.Expr, ...]) -> Region:
    """The indices with key <= query: ``query = key + d`` or ``key = query - d``, with ``d < queries``."""
    query, key = len(sizes) - 2, len(sizes) - 1
    (box,) = whole(sizes)
    return (
        box,
        _chart(box, query, box.rows[key] + box.rows[query], sizes[query]),
        _chart(box, key, box.rows[query] - box.rows[key], sizes[query]),
    )


def upper(sizes: tuple[sympy.Expr, ...]) -> Region:
    """The indices with key > query: ``key = query + 1 + d`` or ``query = key - 1 - d``, with ``d < keys - 1``."""
    query, key = len(sizes) - 2, len(sizes) - 1
    (box,) = whole(sizes)
    one = Affine.constant(1, len(sizes))
    return (
        box,
        _chart(box, key, box.rows[query] + box.rows[key] + one, sizes[key] - 1),
        _chart(box, query, box.rows[key] - box.rows[query] - one, sizes[key] - 1),
    )


def _chart(box: Chart, dim: int, row: Affine, size: sympy.Expr) -> Chart:
    rows, sizes = list(box.rows), list(box.sizes)
    rows[dim], sizes[dim] = row, size
    return Chart(tuple(rows), tuple(sizes))


class MaskProver:
    """Proofs about the tensors of one graph. The graph is read once; every node is proved once."""

    def __init__(self, graph: fx.Graph) -> None:
        self.forms = IndexForms(graph)
        self._proofs: dict[fx.Node, Proof] = {}

    def prove(self, node: fx.Node) -> Proof:
        """What a mask is, as an argument of attention: a bool tensor of what is visible, or a float tensor to add."""
        if node not in self._proofs:
            self._proofs[node] = self._prove(node)
        return self._proofs[node]

    def formula_of(self, node: fx.Node) -> Formula:
        """Where a mask lets attention see, as a formula of the index.

        Of a mask to add, this is where it is 0, provided that elsewhere it is so low that no weight is left: minus
        infinity, or the lowest finite number of its type, which exceeds any difference of scores.
        """
        value = self.forms[node]
        if not isinstance(value, Cases):
            return value
        visible = []
        for condition, leaf in value.parts:
            if leaf == Number(0.0):
                visible.append(condition)
            elif not isinstance(leaf, Number) or not leaf.value <= _lowest(node.meta["val"].dtype):
                return Unknown("a mask to add of other values than 0 and minus infinity")
        return disjunction(*visible)

    def constant(self, node: fx.Node) -> bool | None:
        """Whether a bool tensor is True everywhere, or False everywhere; None if neither can be shown."""
        value = self.forms[node]
        if isinstance(value, Cases) or node.meta["val"].dtype is not torch.bool:
            return None
        sizes = sizes_of(node)
        if _everywhere(value, sizes, self.forms.bounds):
            return True
        return False if _everywhere(negation(value), sizes, self.forms.bounds) else None

    def _prove(self, node: fx.Node) -> Proof:
        formula, sizes, bounds = self.formula_of(node), sizes_of(node), self.forms.bounds
        if not isinstance(formula, Unknown) and _everywhere(formula, sizes, bounds):
            return Proof("all", f"{formula} is true at every index")
        if not isinstance(formula, Unknown) and len(sizes) >= 2:
            below, above = lower(sizes), upper(sizes)
            if _holds(formula, below, sizes, bounds) and _holds(negation(formula), above, sizes, bounds):
                return Proof("causal", f"{formula} is key <= query")
        return Proof("none-provable", f"not shown for all sizes: {formula}")


def _lowest(dtype: torch.dtype) -> float:
    """The number from which on a mask to add hides; of a wide type, that of single precision does as well."""
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)


def _everywhere(formula: Formula, sizes: tuple[sympy.Expr, ...], bounds: SizeBounds) -> bool:
    """Whether a formula is true at every index: directly, or below and above the diagonal."""
    if _holds(formula, whole(sizes), sizes, bounds):
        return True
    return len(sizes) >= 2 and all(_holds(formula, region(sizes), sizes, bounds) for region in (lower, upper))


def _holds(formula: Formula, region: Region, sizes: tuple[sympy.Expr, ...], bounds: SizeBounds) -> bool:
    if isinstance(formula, Truth):
        return formula.value
    if isinstance(formula, Unknown):
        return False
    if isinstance(formula, Every):
        return all(_holds(part, region, sizes, bounds) for part in formula.parts)
    if isinstance(formula, Some):
        return any(_holds(part, region, sizes, bounds) for part in formula.parts)
    return any(_bounded(formula, chart, sizes, bounds) for chart in region)


def _bounded(formula: Formula, chart: Chart, sizes: tuple[sympy.Expr, ...], bounds: SizeBounds) -> bool:
    moved = substitute_formula(formula, chart.rows, len(sizes))
    if isinstance(moved, Truth):
        return moved.value
    return not isinstance(moved, (Unknown, Every, Some)) and bounds.at_most_zero(moved.form, chart.sizes, sizes)


def prove(node: fx.Node) -> Proof:
    """What can be shown of one mask; for several of a graph, a `MaskProver` reads the graph once.

    Example:
        >>> import torch
        >>> class Causal(torch.nn.Module):
        ...     def forward(self, x):
        ...         i = torch.arange(x.shape[1])
        ...         return i[None, :] <= i[:, None]
        >>> length = torch.export.Dim("length")
        >>> program = torch.export.export(Causal(), (torch.ones(2, 5),), dynamic_shapes=({1: length},))
        >>> output = program.graph.output_node().args[0][0]
        >>> print(prove(output).kind, "because", prove(output).reason)
        causal because i1 - i0 <= 0 is key <= query
    """
    return MaskProver(node.graph).prove(node)


def formula_of(node: fx.Node) -> Formula:
    """Where one mask lets attention see, as a formula of the index."""
    return MaskProver(node.graph).formula_of(node)
