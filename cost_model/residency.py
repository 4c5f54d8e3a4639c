"""Which bytes come from memory and which from cache, and which are new pages, over a run of kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from .heap import Block, Heap
from .kernels import Kernel

# A run is repeated until heap and cache are as they stay.
_RUNS = 2


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a kernel moves: bytes from and to memory, and bytes of pages that are taken from the system for it."""

    memory: float = 0.0
    faulted: float = 0.0


@dataclasses.dataclass
class _Held:
    """What a storage has: its block on the heap, if any, and when it was last touched, in bytes touched by then."""

    block: Block | None
    touched: float


class Residency:
    """A cache of a given size that keeps what was touched last, over the heap that tensors are allocated on.

    Of ``b`` bytes that come back after ``d`` others, what a cache of ``C`` bytes still holds is C − d, at most ``b``.
    A result goes where the heap has room: into the block of a tensor that is dead, which may be in cache, or into new
    pages.

    Arguments:
        cache: bytes of the cache.
        heap: whether results are allocated by the C library; otherwise by an allocator that keeps all its memory.
    """

    def __init__(self, cache: float, heap: bool) -> None:
        self._cache = cache
        self._heap = Heap() if heap else None
        self._clock = 0.0
        self._storages: dict[int, _Held] = {}
        self._dead: list[tuple[int, int, float]] = []  # where dead blocks were, and when they were touched
        self._workspaces: list[tuple[int, float]] = []  # sizes of idle ones, and when they were touched

    def run(self, kernels: Sequence[Kernel], lasting: Collection[int]) -> list[Traffic]:
        """The traffic of each kernel, where the run is repeated, as a model is called again and again.

        Arguments:
            kernels: in order.
            lasting: storages that outlive a run: weights and inputs.
        """
        last = {
            storage: place for place, kernel in enumerate(kernels) for storage, _ in (*kernel.reads, *kernel.writes)
        }
        for _ in range(_RUNS):
            traffic = [self._step(place, kernel, last, lasting) for place, kernel in enumerate(kernels)]
        return traffic

    def _step(self, place: int, kernel: Kernel, last: dict[int, int], lasting: Collection[int]) -> Traffic:
        memory = faulted = 0.0
        for storage, size in kernel.reads:
            held = self._storages.setdefault(storage, _Held(None, float("-inf")))
            memory += size - self._hit(held.touched, size)
            held.touched = self._clock = self._clock + size
        for storage, size in kernel.writes:
            known = self._storages.get(storage)
            if known is not None:
                memory += size - self._hit(known.touched, size)
            elif kernel.kept:
                known, hit = self._workspace(size)
                memory += size - hit
            else:
                known, hit, new = self._allocate(size)
                memory += size - hit
                faulted += new
            known.touched = self._clock = self._clock + size
            self._storages[storage] = known
        for storage in {storage for storage, _ in (*kernel.reads, *kernel.writes)}:
            if last[storage] == place and storage not in lasting:
                size = max(size for found, size in (*kernel.reads, *kernel.writes) if found == storage)
                self._release(self._storages.pop(storage), size)
        return Traffic(memory, faulted)

    def _hit(self, touched: float, size: float) -> float:
        """How many of these bytes, last touched then, are in cache."""
        return min(max(self._cache - (self._clock - touched), 0.0), size)

    def _workspace(self, size: int) -> tuple[_Held, float]:
        """Memory that is kept between uses: the smallest idle piece that is large enough."""
        fitting = [piece for piece in self._workspaces if piece[0] >= size]
        if not fitting:
            return _Held(None, float("-inf")), 0.0
        piece = min(fitting)
        self._workspaces.remove(piece)
        return _Held(None, piece[1]), self._hit(piece[1], size)

    def _allocate(self, size: int) -> tuple[_Held, float, int]:
        """A new storage: how many of its bytes are in cache from an earlier use, and how many are new pages."""
        if self._heap is None:
            held, hit = self._workspace(size)
            return held, hit, 0
        block = self._heap.take(size)
        hit, dead = 0.0, []
        for start, end, touched in self._dead:
            overlap = min(end, block.end) - max(start, block.start)
            if overlap <= 0:
                dead.append((start, end, touched))
                continue
            hit += self._hit(touched, overlap)
            dead += [(start, block.start, touched)] * (start < block.start)
            dead += [(block.end, end, touched)] * (end > block.end)
        self._dead = dead
        return _Held(block, self._clock), min(hit, size), block.new

    def _release(self, held: _Held, size: int) -> None:
        if held.block is None or self._heap is None:
            self._workspaces.append((size, held.touched))
            return
        self._heap.give(held.block)
        if not held.block.mapped:
            self._dead.append((held.block.start, held.block.end, held.touched))
