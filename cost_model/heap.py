"""Which allocations take new pages from the system: the C library's heap (glibc), followed block by block.

A page that a process touches for the first time costs a fault, which takes longer than to write it. glibc hands memory
back to the system when a block of more than 32 MiB is freed, which was mapped on its own, and when what is free at the
top of the heap comes to more than 64 MiB (mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD; both start lower and grow
with the blocks that are freed, so these are the limits of a process that has been at work for a while). A model that
crosses a limit faults in the same pages at every call.
"""

from __future__ import annotations

import bisect
import dataclasses

_PAGE = 4096
# Larger blocks are mapped on their own, and more than this is not kept free at the top.
_LIMIT, _TRIM = 32 * 2**20, 64 * 2**20
# The heap grows by this much more than was asked for, and keeps this much when it is trimmed.
_PAD = 128 * 1024
# A freed block smaller than this never trims the heap.
_TRIMS = 64 * 1024
# What torch's alignment and the heap's own header add to a block.
_HEADER = 96


@dataclasses.dataclass(frozen=True)
class Block:
    """A piece of memory: where it starts and ends, whether it is mapped on its own, and which bytes were new pages."""

    start: int
    end: int
    mapped: bool
    new: int


class Heap:
    """The allocator's state.

    >>> heap = Heap()
    >>> first = heap.take(50 * 2**20)
    >>> heap.give(first)
    >>> heap.take(50 * 2**20).new == first.new  # mapped anew
    True
    >>> small = heap.take(2**20)
    >>> heap.give(small)
    >>> again = heap.take(2**20)
    >>> heap.give(again)
    >>> heap.take(2**20).new
    0
    """

    def __init__(self) -> None:
        self._free: list[tuple[int, int]] = []  # blocks below the top, by address
        self._top = 0
        self._break = 0
        self._resident = 0
        self._mapped = 1 << 50  # addresses for mapped blocks

    def take(self, size: int) -> Block:
        """Allocate."""
        need = -(-(size + _HEADER) // 16) * 16
        fitting = [(end - start, start) for start, end in self._free if end - start >= need]
        if fitting:
            _, start = min(fitting)
            return self._carve(start, need)
        if self._break - self._top < need:
            if need >= _LIMIT:
                pages = -(-need // _PAGE) * _PAGE
                self._mapped += pages
                return Block(self._mapped - pages, self._mapped, True, pages)
            self._break = -(-(self._top + need + _PAD) // _PAGE) * _PAGE
        start, self._top = self._top, self._top + need
        new = max(0, self._top - max(start, self._resident))
        self._resident = max(self._resident, self._top)
        return Block(start, self._top, False, new)

    def _carve(self, start: int, need: int) -> Block:
        """Take the beginning of a free block."""
        place = bisect.bisect_left(self._free, (start, 0))
        _, end = self._free.pop(place)
        if end > start + need:
            self._free.insert(place, (start + need, end))
        return Block(start, start + need, False, 0)

    def give(self, block: Block) -> None:
        """Free."""
        if block.mapped:
            return
        start, end = block.start, block.end
        place = bisect.bisect_left(self._free, (start, end))
        if place < len(self._free) and self._free[place][0] == end:
            end = self._free.pop(place)[1]
        if place and self._free[place - 1][1] == start:
            place -= 1
            start = self._free.pop(place)[0]
        if end == self._top:
            self._top = start
            end = self._break
        else:
            self._free.insert(place, (start, end))
        if end - start >= _TRIMS and self._break - self._top >= _TRIM:
            self._break = -(-(self._top + _PAD) // _PAGE) * _PAGE
            self._resident = min(self._resident, self._break)
