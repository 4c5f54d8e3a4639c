"""Which bytes come from memory and which from which cache, and which are new pages, over a run of kernels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

from .heap import Block, Heap
from .kernels import Kernel
from .recency import Recency

# A run is repeated until heap and caches are as they stay.
_RUNS = 2


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a kernel moves: bytes that no core's own cache holds, those of them that are not in the last-level cache
    either, the part of these that it writes, and bytes of pages that are taken from the system for it."""

    outer: float = 0.0
    memory: float = 0.0
    written: float = 0.0
    faulted: float = 0.0


@dataclasses.dataclass(frozen=True)
class Caches:
    """What is still in cache of bytes that were touched before.

    A cache has lost nothing after half its size of other bytes, and all after one and a half: it evicts about what was
    touched least recently, and the part between says how roughly. Others who share the outermost cache fill it as time
    goes by, as if these were bytes of one's own.

    Arguments:
        own: bytes of the caches that belong to the cores alone; 0 for none.
        shared: bytes of the outermost cache that one process can count on.
        retention: seconds after which others have pushed out half of what is in it.

    >>> caches = Caches(own=4e6, shared=100e6, retention=math.inf)
    >>> caches.missed(size=1e6, since=1e6, seconds=0.0)
    (0.0, 0.0)
    >>> caches.missed(size=10e6, since=90e6, seconds=0.0)
    (10000000.0, 5000000.0)
    """

    own: float
    shared: float
    retention: float = math.inf

    def missed(self, size: float, since: float, seconds: float) -> tuple[float, float]:
        """How many of ``size`` bytes that come back after so many others, and so long, are not in the cores' own
        caches, and how many of those are in no cache."""
        distance = since + size
        outer = size * _lost(distance / self.own if self.own else math.inf)
        age = distance / self.shared if self.shared else math.inf
        return outer, min(outer, size * _lost(age + seconds / self.retention))


def _lost(age: float) -> float:
    """The part that a cache has lost at an age of so many of its sizes."""
    return min(1.0, max(0.0, age - 0.5))


@dataclasses.dataclass
class _Held:
    """A piece of memory: its block on the heap, if any, its bytes, and when it was last touched."""

    block: Block | None
    size: float
    touch: int
    time: float


class Residency:
    """Caches over the heap that tensors are allocated on, and the time that goes by.

    A result goes where the heap has room: into the block of a tensor that is dead, which may be in cache, or into new
    pages.

    Arguments:
        caches: what they keep.
        heap: whether results are allocated by the C library; otherwise by an allocator that keeps all its memory.
    """

    def __init__(self, caches: Caches, heap: bool) -> None:
        self._caches = caches
        self._heap = Heap() if heap else None
        self._time = 0.0
        self._recency = Recency(0)
        self._storages: dict[int, _Held] = {}
        self._dead: list[tuple[int, int, _Held]] = []  # where dead blocks were
        self._workspaces: list[_Held] = []  # idle ones

    def run(
        self,
        kernels: Sequence[Kernel],
        lasting: Collection[int],
        seconds: Callable[[Kernel, Traffic], float] = lambda kernel, moved: 0.0,
    ) -> list[Traffic]:
        """The traffic of each kernel, where the run is repeated, as a model is called again and again.

        Arguments:
            kernels: in order.
            lasting: storages that outlive a run: weights and inputs.
            seconds: how long a kernel takes with its traffic.
        """
        last = {
            storage: place for place, kernel in enumerate(kernels) for storage, _ in (*kernel.reads, *kernel.writes)
        }
        self._recency = Recency(_RUNS * sum(len(kernel.reads) + len(kernel.writes) for kernel in kernels))
        for _ in range(_RUNS):
            traffic = []
            for place, kernel in enumerate(kernels):
                traffic.append(self._step(kernel))
                self._time += seconds(kernel, traffic[-1])
                touched = dict((*kernel.reads, *kernel.writes))
                for storage in touched:
                    if last[storage] == place and storage not in lasting:
                        self._release(self._storages.pop(storage))
        return traffic

    def _step(self, kernel: Kernel) -> Traffic:
        """What a kernel moves. Bytes that it reads and writes back count once, as written."""
        outer = memory = written = faulted = 0.0
        sizes = dict((*kernel.reads, *kernel.writes))
        results = {storage for storage, _ in kernel.writes}
        for storage, size in sizes.items():
            held = self._storages.get(storage)
            if held is not None:
                found = self._again(held, size)
            elif storage not in results:
                self._storages[storage], found = self._new(None, size), (size, size)
            elif kernel.kept or self._heap is None:
                self._storages[storage], found = self._workspace(size)
            else:
                self._storages[storage], found, new = self._allocate(self._heap, size)
                faulted += new
            outer, memory = outer + found[0], memory + found[1]
            written += found[1] if storage in results else 0.0
        return Traffic(outer, memory, written, faulted)

    def _new(self, block: Block | None, size: float) -> _Held:
        return _Held(block, size, self._recency.touch(size), self._time)

    def _again(self, held: _Held, size: float) -> tuple[float, float]:
        """Touch so many bytes of a piece of memory."""
        missed = self._caches.missed(size, self._recency.since(held.touch), self._time - held.time)
        self._recency.forget(held.touch, held.size)
        held.size = max(held.size, size)
        held.touch, held.time = self._recency.touch(held.size), self._time
        return missed

    def _workspace(self, size: int) -> tuple[_Held, tuple[float, float]]:
        """Memory that is kept between uses: the smallest idle piece that is large enough."""
        fitting = [piece for piece in self._workspaces if piece.size >= size]
        if not fitting:
            return self._new(None, size), (size, size)
        piece = min(fitting, key=lambda piece: piece.size)
        self._workspaces = [other for other in self._workspaces if other is not piece]
        return piece, self._again(piece, size)

    def _allocate(self, heap: Heap, size: int) -> tuple[_Held, tuple[float, float], int]:
        """A new storage, in what was another one or in new pages, which the system has just cleared."""
        block = heap.take(size)
        outer, memory = 0.0, 0.0
        dead = []
        for start, end, held in self._dead:
            overlap = min(end, block.end) - max(start, block.start)
            if overlap <= 0:
                dead.append((start, end, held))
                continue
            found = self._caches.missed(overlap, self._recency.since(held.touch), self._time - held.time)
            outer, memory = outer + found[0], memory + found[1]
            self._recency.forget(held.touch, overlap)
            dead += [(start, block.start, held)] * (start < block.start)
            dead += [(block.end, end, held)] * (end > block.end)
        self._dead = dead
        return self._new(block, block.end - block.start), (outer, memory), block.new

    def _release(self, held: _Held) -> None:
        if held.block is None or self._heap is None:
            self._workspaces.append(held)
            return
        self._heap.give(held.block)
        if held.block.mapped:
            self._recency.forget(held.touch, held.size)
        else:
            self._dead.append((held.block.start, held.block.end, held))
