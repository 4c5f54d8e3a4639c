"""How the axes of a tensor are made of tokens and channels: read off indices, and used to lay a tensor out anew."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import fx

from ..finding.axes import Size, product, quotient, size
from ..program import fixed_size

_aten = torch.ops.aten
TOKENS, ROWS, COPIES = "tokens", "rows", "copies"
Insert = Callable[..., fx.Node]


@dataclasses.dataclass(frozen=True)
class Factor:
    """A part of an axis, outermost first: along it, either the token changes, or the row, or neither."""

    axis: int
    kind: str
    size: int


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """The axes of a tensor that has one element, or several equal ones, for every (token, row).

    ``tokens`` are the places of the token factors among ``factors``, in the order in which tokens are numbered;
    ``rows`` has the row of every combination of the row factors, which are its dimensions.
    """

    factors: tuple[Factor, ...]
    tokens: tuple[int, ...]
    rows: torch.Tensor

    def places(self, kind: str) -> list[int]:
        """Where the factors of a kind are."""
        return [place for place, factor in enumerate(self.factors) if factor.kind == kind]

    def row_axes(self) -> list[int]:
        """The axes of the tensor that the dimensions of ``rows`` belong to."""
        return [self.factors[place].axis for place in self.places(ROWS)]


def arrange(tokens: torch.Tensor, rows: torch.Tensor, token_count: int) -> Arrangement | None:
    """The arrangement of a tensor from the token and the row of each of its elements.

    None where no axis can be split so that along each part only the token or only the row changes, or where the tokens
    are not all there.

    >>> x = torch.arange(12).reshape(2, 6)                     # two tokens of six rows: three heads of two channels
    >>> split = lambda v: v.reshape(2, 3, 2).transpose(0, 1)
    >>> found = arrange(split(x // 6), split(x % 6), 2)
    >>> [factor.kind for factor in found.factors], found.rows.tolist()
    (['rows', 'tokens', 'rows'], [[0, 1], [2, 3], [4, 5]])
    """
    factors: list[Factor] = []
    for axis in range(tokens.dim()):
        first = tuple(slice(None) if other == axis else 0 for other in range(tokens.dim()))
        found = _factors(tokens[first], rows[first])
        if found is None:
            return None
        factors += [Factor(axis, kind, count) for kind, count in found]
    shape = [factor.size for factor in factors]
    tokens, rows = tokens.reshape(shape), rows.reshape(shape)
    for place, factor in enumerate(factors):
        if (factor.kind != TOKENS and _varies(tokens, place)) or (factor.kind != ROWS and _varies(rows, place)):
            return None
    own = {kind: [place for place, factor in enumerate(factors) if factor.kind == kind] for kind in (TOKENS, ROWS)}
    of_tokens = tokens[tuple(slice(None) if factor.kind == TOKENS else 0 for factor in factors)]
    of_rows = rows[tuple(slice(None) if factor.kind == ROWS else 0 for factor in factors)]
    for order in itertools.permutations(range(len(own[TOKENS]))):
        if torch.equal(of_tokens.permute(order).flatten(), torch.arange(token_count)):
            return Arrangement(tuple(factors), tuple(own[TOKENS][place] for place in order), of_rows)
    return None


def _factors(tokens: torch.Tensor, rows: torch.Tensor) -> list[tuple[str, int]] | None:
    """The factors of one axis."""
    counts = {TOKENS: len(tokens.unique()), ROWS: len(rows.unique())}
    copies, rest = divmod(len(tokens), counts[TOKENS] * counts[ROWS])
    if rest:
        return None
    kinds = [(kind, count) for kind, count in ((*counts.items(), (COPIES, copies))) if count > 1]
    for order in itertools.permutations(kinds):
        shape = [count for _, count in order]
        values = {TOKENS: tokens.reshape(shape), ROWS: rows.reshape(shape)}
        if not any(_varies(values[k], i) for i, (kind, _) in enumerate(order) for k in values if k != kind):
            return list(order)
    return None


def fits(found: Arrangement, node: fx.Node) -> bool:
    """Whether an arrangement that was read at the sizes of the example holds at all sizes: what is free are tokens."""
    for axis, value in enumerate(node.meta["val"].shape):
        parts = [factor for factor in found.factors if factor.axis == axis]
        numbers = math.prod(factor.size for factor in parts if factor.kind != TOKENS)
        if fixed_size(value) is not None:
            continue
        if all(factor.kind != TOKENS for factor in parts) or quotient(known_size(value), numbers) is None:
            return False
    return True


def _varies(values: torch.Tensor, axis: int) -> bool:
    return bool((values.narrow(axis, 0, 1) != values).any())


@dataclasses.dataclass(frozen=True)
class Layer:
    """Lays tensors out as an arrangement says, or back, by nodes that ``insert`` makes before ``like``.

    ``like`` is the node that the arrangement was read from. ``sizes`` replaces the sizes of some of its row factors,
    by their place; ``rows`` is the order in which rows are numbered, where it is not that of the axes. Sizes are read
    from no node of ``avoid``: those that are on their way out.
    """

    arrangement: Arrangement
    like: fx.Node
    insert: Insert
    sizes: Mapping[int, int] = dataclasses.field(default_factory=dict)
    rows: tuple[int, ...] | None = None
    avoid: Set[fx.Node] = frozenset()

    @property
    def _order(self) -> list[int]:
        """The places of tokens and rows, in the order in which they are numbered."""
        return [*self.arrangement.tokens, *(self.arrangement.places(ROWS) if self.rows is None else self.rows)]

    def lay_out(self, base: fx.Node, feature: int) -> fx.Node:
        """A tensor of tokens × rows, rows at dimension ``feature``, laid out."""
        found, value = self.arrangement, base
        rank = base.meta["val"].dim()
        if feature % rank != rank - 1:
            value = self.insert(_aten.movedim.int, value, feature, -1)
        order = self._order
        value = self._reshaped(value, [self._size(place) for place in order])
        value = self._permuted(value, [order.index(place) for place in sorted(order)])
        copies = found.places(COPIES)
        for place in copies:
            value = self.insert(_aten.unsqueeze.default, value, place)
        if copies:
            sizes = [found.factors[place].size if place in copies else -1 for place in range(len(found.factors))]
            value = self.insert(_aten.expand.default, value, sizes)
        return self._reshaped(value, [self._axis_size(axis) for axis in range(self.like.meta["val"].dim())])

    def take_in(self, value: fx.Node, sizes: list[Any]) -> fx.Node:
        """A tensor laid out so as one of ``sizes`` that has its tokens in order, and last its rows."""
        found = self.arrangement
        value = self._reshaped(value, [self._size(place) for place in range(len(found.factors))])
        value = self._permuted(value, self._order)
        return self._reshaped(value, sizes)

    def _size(self, place: int) -> Any:
        """The size of a factor: a number, or a node that has it."""
        factor = self.arrangement.factors[place]
        if factor.kind != TOKENS:
            return self.sizes.get(place, factor.size)
        others = [f.size for i, f in enumerate(self.arrangement.factors) if f.axis == factor.axis and i != place]
        whole = quotient(known_size(self.like.meta["val"].shape[factor.axis]), product(others))
        assert whole is not None
        return size_before(self.like, whole, self.insert, self.avoid)

    def _axis_size(self, axis: int) -> Any:
        places = [place for place, factor in enumerate(self.arrangement.factors) if factor.axis == axis]
        sizes = [self._size(place) for place in places]
        numbers = math.prod(value for value in sizes if isinstance(value, int))
        nodes = [value for value in sizes if not isinstance(value, int)]
        if not nodes:
            return numbers
        whole = nodes[0]
        return whole if numbers == 1 else self.insert(operator.mul, whole, numbers)

    def _reshaped(self, value: fx.Node, shape: list[Any]) -> fx.Node:
        if _shape(value.meta["val"].shape) == _shape(s.meta["val"] if isinstance(s, fx.Node) else s for s in shape):
            return value
        return self.insert(_aten.reshape.default, value, shape)

    def _permuted(self, value: fx.Node, order: list[int]) -> fx.Node:
        return value if order == sorted(order) else self.insert(_aten.permute.default, value, order)


def _shape(sizes: Any) -> list[str]:
    return [str(known_size(s)) for s in sizes]


def known_size(value: Any) -> Size:
    """A size as a number wherever it is known, else as an expression."""
    number = fixed_size(value)
    return size(value) if number is None else number


def size_before(node: fx.Node, wanted: Size, insert: Insert, avoid: Set[fx.Node] = frozenset()) -> Any:
    """A size as a number, or as a node that has it: one that is there before ``node``, or a new one.

    It is read from no tensor of ``avoid``.
    """
    if isinstance(wanted, int):
        return wanted
    before = [n for n in _before(node) if n not in avoid and avoid.isdisjoint(n.all_input_nodes)]
    for candidate in before:
        value = candidate.meta.get("val")
        if isinstance(value, torch.SymInt) and known_size(value) == wanted:
            return candidate
    for candidate in before:
        value = candidate.meta.get("val")
        for dim, found in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if known_size(found) == wanted:
                return insert(_aten.sym_size.int, candidate, dim)
    raise AssertionError(f"no node has the size {wanted}")


def _before(node: fx.Node) -> Iterator[fx.Node]:
    return itertools.takewhile(lambda candidate: candidate is not node, node.graph.nodes)
