"""Measuring time and memory: interleaved rounds, and the peak of what a call allocates."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch._C._profiler import _ExtraFields_Allocation, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile
from torch.utils import benchmark

from ..map_workspace import release_workspaces

_KINETO_SILENT = "6"
_SHORTEST = 1e-7
_FEWEST = 3


@dataclasses.dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it.

    >>> str(Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]))
    '3 (2 to 4)'
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The median and the quartiles of some values."""
        ordered = sorted(values)
        return cls(_quantile(ordered, 0.5), _quantile(ordered, 0.25), _quantile(ordered, 0.75))

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclasses.dataclass(frozen=True)
class Timing:
    """The time of one function: seconds per call, round by round, each the mean of ``calls`` calls.

    >>> fast, slow = Timing((1e-3, 1e-3, 2e-3), 10), Timing((2e-3, 2e-3, 2e-3), 5)
    >>> str(fast)
    '1.00 ms (1.00 to 1.50)'
    >>> str(fast.speedup_over(slow))
    '2 (1.5 to 2)'
    """

    rounds: tuple[float, ...]
    calls: int

    @property
    def seconds(self) -> Spread:
        """Median and quartiles of a call's time."""
        return Spread.of(self.rounds)

    def speedup_over(self, other: Timing) -> Spread:
        """How many times faster this is than another, from the rounds that both were timed in."""
        return Spread.of([theirs / mine for mine, theirs in zip(self.rounds, other.rounds, strict=True)])

    def __str__(self) -> str:
        spread = self.seconds
        unit, name = (1.0, "s") if spread.median >= 1 else (1e3, "ms") if spread.median >= 1e-3 else (1e6, "µs")
        digits = max(0, 2 - math.floor(math.log10(max(spread.median * unit, 1.0))))
        median, low, high = (f"{value * unit:.{digits}f}" for value in (spread.median, spread.low, spread.high))
        return f"{median} {name} ({low} to {high})"


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, seconds: float = 2.0, rounds: int = 9
) -> dict[str, Timing]:
    """Time functions against each other, so that whatever else the machine does meets all of them alike.

    Each is called to warm up; then every round times every one, in an order that is reversed from round to round, with
    the clock of `torch.utils.benchmark`, which waits for the device. (Its `Timer` would call two times more for every
    timing, and with one thread.)

    Args:
        functions: what to time, by name.
        seconds: roughly how long to measure, all functions and rounds together.
        rounds: number of rounds; a function is called at least once in each. Slow functions get fewer, down to 3.

    Returns:
        The timing of each function, under its name.

    Raises:
        ValueError: there is nothing to time, or there are no rounds.

    >>> timings = interleaved({"small": lambda: sum(range(10)), "large": lambda: sum(range(10**5))}, seconds=0.05)
    >>> timings["small"].seconds.median < timings["large"].seconds.median
    True
    """
    if not functions or rounds < 1:
        raise ValueError(f"expected functions to time and rounds ≥ 1, found {len(functions)} functions, {rounds=}")
    timers = {name: timeit.Timer(function, timer=benchmark.timer) for name, function in functions.items()}
    single = {}
    for name, timer in timers.items():
        single[name] = timer.timeit(1)
        if single[name] < seconds:
            single[name] = max(timer.timeit(1), _SHORTEST)
    rounds = max(min(rounds, _FEWEST), min(rounds, int(seconds / sum(single.values()))))
    share = seconds / (rounds * len(timers))
    calls = {name: max(1, int(share / time)) for name, time in single.items()}
    times: dict[str, list[float]] = {name: [] for name in timers}
    order = list(timers)
    for _ in range(rounds):
        for name in order:
            times[name].append(timers[name].timeit(calls[name]) / calls[name])
        order.reverse()
    return {name: Timing(tuple(values), calls[name]) for name, values in times.items()}


def peak_memory(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes of tensors that a call holds at a time, above what was held before it.

    On CUDA what torch's allocator counts; on the CPU the running sum of the profiler's record of what the call
    allocates and frees again (freeing what was held before counts for nothing). The storage that rewritten models keep
    for their attention maps between calls is freed before, and so counts. What libraries allocate for themselves is not
    in it. The function is called twice: the first call warms up.

    Args:
        function: what to measure. Its result counts, and is dropped.
        device: the device whose memory is meant.

    Returns:
        Bytes, 0 or more.

    >>> peak_memory(lambda: torch.zeros(1000, dtype=torch.float32))
    4000
    """
    device = torch.device(device)
    function()
    if device.type == "cuda":
        return _cuda_peak(function, device)
    if device.type == "cpu":
        return _cpu_peak(function)
    raise ValueError(f"peak memory is measured on cpu and cuda, found device {device}")


def _cuda_peak(function: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - before)


def _cpu_peak(function: Callable[[], object]) -> int:
    release_workspaces()
    with _silent_kineto(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function()
    del result
    events = profiled.profiler.kineto_results.experimental_event_tree() if profiled.profiler else []
    peak = total = 0
    held: dict[int, int] = {}
    for _, address, size in sorted(_allocations(events)):
        if size < 0:
            total -= held.pop(address, 0)
        else:
            held[address] = size
            total += size
            peak = max(peak, total)
    return peak


def _allocations(events: Iterable[_ProfilerEvent]) -> Iterator[tuple[int, int, int]]:
    """When, where and how many bytes: what was allocated on the CPU at and below events, and (negative) freed."""
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        fields = event.extra_fields
        if isinstance(fields, _ExtraFields_Allocation) and fields.device.type == "cpu" and fields.ptr is not None:
            yield event.start_time_ns, fields.ptr, fields.alloc_size


@contextlib.contextmanager
def _silent_kineto() -> Iterator[None]:
    """Keep the profiler's library, which reads this variable as it starts, from reporting on stderr."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, _KINETO_SILENT)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)


def _quantile(ordered: Sequence[float], fraction: float) -> float:
    place = fraction * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
