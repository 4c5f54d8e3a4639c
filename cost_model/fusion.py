"""What a compiler makes of kernels: neighbours that go element by element become one, and keep values in registers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from .kernels import Kernel


def fuse(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Merge runs of fusible kernels.

    In a run, what one kernel writes and a later one reads is not read again, and what nobody reads after the run is
    not written at all. Each kernel keeps its own arithmetic and the rest of its traffic; only the first one of a run
    costs a call.

    Arguments:
        kernels: in order, views among them.
    """
    last = {storage: place for place, kernel in enumerate(kernels) for storage, _ in (*kernel.reads, *kernel.writes)}
    made: list[Kernel] = []
    for start, end in _runs(kernels):
        inside: set[int] = set()
        dispatched = False
        for kernel in kernels[start:end]:
            if kernel.family == "view" or not kernel.fusible:
                made.append(kernel)
                continue
            reads = tuple((storage, size) for storage, size in kernel.reads if storage not in inside)
            inside.update(storage for storage, _ in (*kernel.reads, *kernel.writes))
            writes = tuple((storage, size) for storage, size in kernel.writes if last[storage] >= end)
            dispatch = "" if dispatched else "element"
            made.append(dataclasses.replace(kernel, reads=reads, writes=writes, dispatch=dispatch))
            dispatched = True
    return made


def _runs(kernels: Sequence[Kernel]) -> Iterator[tuple[int, int]]:
    """The ends of the longest runs of fusible kernels and views, and of what is between them."""
    start = 0
    for place, kernel in enumerate(kernels):
        if kernel.family != "view" and not kernel.fusible:
            if place > start:
                yield start, place
            yield place, place + 1
            start = place + 1
    if start < len(kernels):
        yield start, len(kernels)
