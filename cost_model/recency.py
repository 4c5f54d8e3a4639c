"""How many bytes were touched since something was: each byte counted once, however often it was touched."""

from __future__ import annotations


class Recency:
    """Pieces of memory in the order in which they were touched last.

    A piece is known by the number of its last touch. Bytes since a touch are added up in a Fenwick tree, since a model
    touches thousands of pieces, each of which asks.

    Arguments:
        touches: how many there can be.

    >>> memory = Recency(4)
    >>> first, second = memory.touch(10), memory.touch(5)
    >>> memory.since(first)
    5.0
    >>> memory.forget(second, 5)
    >>> second = memory.touch(5)  # the same piece again: its bytes count once
    >>> memory.since(first), memory.since(second)
    (5.0, 0.0)
    """

    def __init__(self, touches: int) -> None:
        self._tree = [0.0] * (touches + 1)
        self._last = 0
        self._bytes = 0.0

    def touch(self, size: float) -> int:
        """Touch a piece that is new, or was forgotten; returns its number."""
        self._last += 1
        self._add(self._last, size)
        return self._last

    def forget(self, touch: int, size: float) -> None:
        """Take so many of the bytes of a piece out of the count: they are touched again, or gone."""
        self._add(touch, -size)

    def since(self, touch: int) -> float:
        """Bytes that were touched after a piece was."""
        before = 0.0
        while touch:
            before += self._tree[touch]
            touch &= touch - 1
        return self._bytes - before

    def _add(self, place: int, size: float) -> None:
        self._bytes += size
        while place < len(self._tree):
            self._tree[place] += size
            place += place & -place
