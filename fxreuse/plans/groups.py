"""How the layers of a stack are grouped: which layer computes an attention map, and which ones reuse it.

Each written form is one small class. All of them answer the same two questions: how many layers they are for, and who
leads each layer.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import ClassVar

from ..errors import PlanError


@dataclasses.dataclass(frozen=True)
class Groups(abc.ABC):
    """The groups of a reuse plan. `str` gives the written form back.

    >>> Uniform(2, 3).leaders(6)
    (0, 0, 2, 2, 4, 4)
    """

    form: ClassVar[str]

    @property
    @abc.abstractmethod
    def layers(self) -> int | None:
        """The number of layers that these groups are for; None where they extend to the end of any stack."""

    @abc.abstractmethod
    def _assign(self, layers: int) -> tuple[int, ...]:
        """The leader of every layer, for a number of layers that fits."""

    def head_counts(self, layers: int) -> tuple[int | None, ...]:
        """The number of heads that each layer is to have; None where it keeps its own.

        Args:
            layers: the number of layers of the stack, one that fits.

        >>> Open(2, heads=8).head_counts(3)
        (8, 8, 8)
        """
        return (None,) * layers

    @property
    def extent(self) -> str:
        """The number of layers in words, for messages."""
        return "any number of layers" if self.layers is None else count_layers(self.layers)

    def fits(self, layers: int) -> bool:
        """Whether a stack of so many layers can be grouped like this."""
        return layers == self.layers

    def leaders(self, layers: int) -> tuple[int, ...]:
        """The index of the layer whose map each layer uses; a leader has its own.

        Args:
            layers: the number of layers of the stack.

        Raises:
            PlanError: the groups are for another number of layers.

        >>> Pattern("FSSFS").leaders(5)
        (0, 0, 0, 3, 3)
        """
        if self.fits(layers):
            return self._assign(layers)
        raise PlanError(f"{self} is for {self.extent}, found {layers}; {describe_fitting(layers)}")


@dataclasses.dataclass(frozen=True)
class Uniform(Groups):
    """``4x3``: three groups of four layers. ``by`` in place of ``x`` is the papers' notation and means the same.

    ``4(H8)x3`` gives every layer eight heads, of half the width if it had four.

    >>> Uniform(4, 3).leaders(12)
    (0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8)
    """

    form: ClassVar[str] = "4x4 or 4by4 (4 layers a group, 4 groups)"

    size: int
    count: int
    sign: str = dataclasses.field(default="x", compare=False)
    heads: int | None = None

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_heads(self.heads)
        _check_count(self.count)
        if self.sign not in ("x", "by"):
            raise PlanError(f"uniform groups are written with 'x' or 'by', found {self.sign!r}")

    def __str__(self) -> str:
        return f"{self.size}{_in_brackets(self.heads)}{self.sign}{self.count}"

    @property
    def layers(self) -> int:
        """Size times count."""
        return self.size * self.count

    def head_counts(self, layers: int) -> tuple[int | None, ...]:
        """The same for every layer."""
        return (self.heads,) * layers

    def _assign(self, layers: int) -> tuple[int, ...]:
        return _chunks(self.size, layers)


@dataclasses.dataclass(frozen=True)
class Open(Groups):
    """``2x*``: groups of two layers to the end of the stack, the last one shorter if need be.

    >>> Open(2).leaders(5)
    (0, 0, 2, 2, 4)
    """

    form: ClassVar[str] = "2x* (to the end of the stack)"

    size: int
    heads: int | None = None

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_heads(self.heads)

    def __str__(self) -> str:
        return f"{self.size}{_in_brackets(self.heads)}x*"

    @property
    def layers(self) -> None:
        """Any number."""
        return None

    @property
    def extent(self) -> str:
        """The least number of layers in words."""
        return f"{self._least} or more layers"

    @property
    def _least(self) -> int:
        return min(self.size, 2)

    def fits(self, layers: int) -> bool:
        """Whether the stack is long enough for a map to be shared at all."""
        return layers >= self._least

    def head_counts(self, layers: int) -> tuple[int | None, ...]:
        """The same for every layer."""
        return (self.heads,) * layers

    def _assign(self, layers: int) -> tuple[int, ...]:
        return _chunks(self.size, layers)


@dataclasses.dataclass(frozen=True)
class Run:
    """``4(H8)x2``: two groups of four layers of eight heads each, as a part of `Sizes`.

    >>> print(Run(4), Run(4, heads=8), Run(4, 2, 8))
    4 4(H8) 4(H8)x2
    """

    size: int
    count: int = 1
    heads: int | None = None

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_count(self.count)
        _check_heads(self.heads)

    def __str__(self) -> str:
        return f"{self.size}{_in_brackets(self.heads)}" + (f"x{self.count}" if self.count > 1 else "")


@dataclasses.dataclass(frozen=True)
class Sizes(Groups):
    """``4+4+8``, ``4(H8)x2+4(H4)x2``: the size of every group, and the heads of its layers.

    >>> Sizes((Run(1), Run(3))).leaders(4)
    (0, 1, 1, 1)
    >>> Sizes((Run(1, 2, heads=8), Run(2))).head_counts(4)
    (8, 8, None, None)
    """

    form: ClassVar[str] = "4+4+8 (sizes of groups), 4(H8)x2+4(H4)x2 (8 heads, then 4)"

    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        if len(self.runs) < 2:
            raise PlanError(f"sizes are written for 2 or more groups, as in 4+4+8, found {len(self.runs)}")

    def __str__(self) -> str:
        return "+".join(map(str, self.runs))

    @property
    def layers(self) -> int:
        """The sum of the sizes."""
        return sum(run.size * run.count for run in self.runs)

    def head_counts(self, layers: int) -> tuple[int | None, ...]:
        """As each run says."""
        return tuple(run.heads for run in self.runs for _ in range(run.size * run.count))

    def _assign(self, layers: int) -> tuple[int, ...]:
        sizes = [run.size for run in self.runs for _ in range(run.count)]
        starts = itertools.accumulate(sizes, initial=0)
        return tuple(start for start, size in zip(starts, sizes, strict=False) for _ in range(size))


@dataclasses.dataclass(frozen=True)
class Pattern(Groups):
    """``FSSF``: a letter per layer; F computes its map in full, S shares the map of the last F before it.

    >>> Pattern("FSSF").leaders(4)
    (0, 0, 0, 3)
    """

    form: ClassVar[str] = "FSSSFSSS (F computes, S shares)"

    letters: str

    def __post_init__(self) -> None:
        if not re.fullmatch("[FS]+", self.letters):
            raise PlanError(f"a pattern is written with the letters F and S, found {self.letters!r}")
        if self.letters[0] != "F":
            raise PlanError("the first layer has no map before it to share, so the first letter is F, found S")

    def __str__(self) -> str:
        return self.letters

    @property
    def layers(self) -> int:
        """One per letter."""
        return len(self.letters)

    def _assign(self, layers: int) -> tuple[int, ...]:
        computed = (layer if letter == "F" else 0 for layer, letter in enumerate(self.letters))
        return tuple(itertools.accumulate(computed, max))


@dataclasses.dataclass(frozen=True)
class Leaders(Groups):
    """``leaders=0,0,2,2``: the leader of every layer, which need not be the last one before it.

    >>> Leaders((0, 1, 0, 1)).leaders(4)
    (0, 1, 0, 1)
    """

    form: ClassVar[str] = "leaders=0,0,2,2 (leader of every layer)"

    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.indices:
            raise PlanError("leaders= takes the index of a leader for every layer, as in leaders=0,0,2,2, found none")
        for layer, leader in enumerate(self.indices):
            if not 0 <= leader <= layer:
                raise PlanError(f"the leader of layer {layer} is one of the layers 0 to {layer}, found {leader}")
            if self.indices[leader] != leader:
                raise PlanError(
                    f"a leader leads itself, but layer {layer} has the leader {leader}, "
                    f"and layer {leader} has the leader {self.indices[leader]}"
                )

    def __str__(self) -> str:
        return "leaders=" + ",".join(map(str, self.indices))

    @property
    def layers(self) -> int:
        """One per index."""
        return len(self.indices)

    def _assign(self, layers: int) -> tuple[int, ...]:
        return self.indices


def count_layers(layers: int) -> str:
    """The number with its noun.

    >>> count_layers(1), count_layers(12)
    ('1 layer', '12 layers')
    """
    return "1 layer" if layers == 1 else f"{layers} layers"


def fitting(layers: int) -> Sequence[str]:
    """Some plans that a stack of so many layers takes, smallest groups first.

    >>> fitting(12)
    ['2x6', '3x4', '4x3', '2x*']
    """
    if layers < 2:
        return ["1x*"] if layers == 1 else []
    sizes = [size for size in range(2, layers + 1) if layers % size == 0]
    return [f"{size}x{layers // size}" for size in sizes[:3]] + ["2x*"]


def describe_fitting(layers: int) -> str:
    """The same as a clause of a message.

    >>> describe_fitting(2)
    'plans for 2 layers: 2x1, 2x*'
    """
    return f"plans for {count_layers(layers)}: " + (", ".join(fitting(layers)) or "none")


def _check_size(size: int) -> None:
    if size < 1:
        raise PlanError(f"a group has at least 1 layer, found {size}")


def _check_count(count: int) -> None:
    if count < 1:
        raise PlanError(f"there is at least 1 group, found {count}")


def _check_heads(heads: int | None) -> None:
    if heads is not None and heads < 1:
        raise PlanError(f"a layer has at least 1 head, found {heads}")


def _in_brackets(heads: int | None) -> str:
    return "" if heads is None else f"(H{heads})"


def _chunks(size: int, layers: int) -> tuple[int, ...]:
    return tuple(layer - layer % size for layer in range(layers))
