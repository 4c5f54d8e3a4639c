"""What the axes of an attention map count: tokens, and how they were moved before they were attended over."""

from __future__ import annotations

import dataclasses

from .finding.axes import Layout, Part, Size


@dataclasses.dataclass(frozen=True)
class Movement:
    """Something that moves the elements of an axis, or takes some of them.

    The amounts of a ``roll`` are by how much and the size of the axis; those of a ``slice`` where it starts, where it
    stops, and the size.
    """

    kind: str
    amounts: tuple[Size | str, ...] = ()

    def __str__(self) -> str:
        amounts = self.amounts[:2] if self.kind == "slice" else self.amounts[:1]
        return f"{self.kind} {':'.join(map(str, amounts))}".strip()


@dataclasses.dataclass(frozen=True)
class Axis:
    """Dimension ``dim`` of a value, which is the ``origin``-th of its graph, and what it went through since.

    ``dim`` is None for an axis that several were made into one of; ``name`` then says which.
    """

    origin: int
    name: str
    dim: int | None
    movements: tuple[Movement, ...] = ()

    def moved_by(self, movement: Movement) -> Axis:
        """The axis after one more movement; one that undoes the last leaves no trace.

        >>> rows = Axis(0, "x", 1)
        >>> rows.moved_by(roll(-3, 8)).moved_by(roll(3, 8)) == rows
        True
        """
        before, last = self.movements[:-1], self.movements[-1:]
        if last and last[0].kind == movement.kind:
            both = _joined(last[0], movement)
            if both is not None:
                return dataclasses.replace(self, movements=before + both)
        return dataclasses.replace(self, movements=(*self.movements, movement))

    def __str__(self) -> str:
        text = self.name if self.dim is None else f"{self.name}[{self.dim}]"
        return " ".join([text, *(f"({movement})" for movement in self.movements)])


def roll(by: Size, full: Size) -> Movement:
    """A roll of an axis of size ``full``.

    >>> roll(-1, 4) == roll(3, 4)
    True
    """
    return Movement("roll", (by % full if isinstance(by, int) and isinstance(full, int) else by, full))


def _joined(first: Movement, second: Movement) -> tuple[Movement, ...] | None:
    """Two movements of one kind as one, or as none; None where they stay two."""
    if first.kind == "flip":
        return ()
    if first.kind == "roll":
        both = roll(first.amounts[0] + second.amounts[0], first.amounts[1])  # type: ignore[operator]
        return () if both.amounts[0] == 0 else (both,)
    if first.kind == "slice":
        offset, _, full = first.amounts
        start, stop, _ = second.amounts
        return (Movement("slice", (offset + start, offset + stop, full)),)  # type: ignore[operator]
    return None


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The axes of tokens behind every dimension of a map, outermost first; heads and what is unknown are empty texts.

    ``origins`` are the values that the axes belong to.
    """

    dims: tuple[tuple[str, ...], ...] = ()
    origins: frozenset[str] = frozenset()

    @staticmethod
    def of(layout: Layout) -> Tokens:
        """The tokens of a map with this layout."""
        axes = [part.source for dim in layout for part in dim if isinstance(part.source, Axis)]
        dims = tuple(tuple(_text(part) for part in dim if part.size != 1) for dim in layout)
        return Tokens(dims, frozenset(axis.name if axis.dim is not None else f"({axis.name})" for axis in axes))

    def differ(self, other: Tokens) -> bool:
        """Whether two maps of one shape are certain to be over different tokens.

        Axes are compared that belong to the same values, dimension by dimension; where they do not, or where some are
        unknown in one map only, nothing is certain.
        """
        unknown = [[dim.count("") for dim in tokens.dims] for tokens in (self, other)]
        return self.origins == other.origins and unknown[0] == unknown[1] and self.dims != other.dims

    def __str__(self) -> str:
        return " × ".join("·".join(text or "…" for text in dim) or "1" for dim in self.dims)


def _text(part: Part) -> str:
    if not isinstance(part.source, Axis):
        return ""
    way = "".join(f" {'inner' if piece else 'outer'}" for piece in part.piece)
    return f"{part.source}{way}"
