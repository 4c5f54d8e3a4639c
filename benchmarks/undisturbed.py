"""Interleaved timing on a machine that others use, too: rounds in which they ran are dropped (Linux)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fxreuse.checking.measure import Timing

SHORTEST = 0.1
TICK = 1 / os.sysconf("SC_CLK_TCK")


def undisturbed(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 9,
    seconds: float = 30.0,
    share: float = 0.25,
    settled: bool = False,
) -> tuple[dict[str, Timing], int]:
    """Time functions against each other, as `fxreuse.checking.measure.interleaved` does, where nothing else runs.

    Arguments:
        functions: what to time, by name.
        rounds: how many rounds to keep.
        seconds: when to stop, however many were kept.
        share: how much of the processors' time others may take in a round.
        settled: call a function once, not timed, before its calls in each round: caches and heap are then as it leaves
            them itself, and not as the function before it does.

    Returns:
        The timings of the rounds that were kept, and how many were dropped. Where fewer than three were kept, these are
        the three in which others took least.
    """
    calls = {}
    for name, function in functions.items():
        function()
        once = _time(function, 1)
        calls[name] = 1 if once > SHORTEST else max(1, round(SHORTEST / min(once, _time(function, 1))))
    kept: list[tuple[float, dict[str, float]]] = []
    end = time.perf_counter() + seconds
    order = list(functions)
    while sum(others <= share for others, _ in kept) < rounds and (len(kept) < 3 or time.perf_counter() < end):
        start, busy = time.perf_counter(), _others()
        times = {}
        for name in order:
            if settled:
                functions[name]()
            times[name] = _time(functions[name], calls[name])
        others = (_others() - busy - TICK) / ((time.perf_counter() - start) * (os.cpu_count() or 1))
        kept.append((others, times))
        order.reverse()
    quiet = [times for others, times in kept if others <= share]
    if len(quiet) < 3:
        quiet = [times for _, times in sorted(kept, key=lambda pair: pair[0])[:3]]
    timings = {name: Timing(tuple(times[name] for times in quiet), calls[name]) for name in functions}
    return timings, len(kept) - len(quiet)


def processor_time(
    functions: Mapping[str, Callable[[], object]], *, rounds: int = 9, seconds: float = 30.0
) -> dict[str, Timing]:
    """Time functions by what this process spends on them, which others do not add to. For one thread only."""
    for function in functions.values():
        function()
    calls = {name: max(1, round(SHORTEST / _time(function, 1))) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    for done in range(rounds):
        if done < 3 or time.perf_counter() < end:
            for name, function in functions.items():
                times[name].append(_time(function, calls[name], time.process_time))
    return {name: Timing(tuple(values), calls[name]) for name, values in times.items()}


def _time(function: Callable[[], object], calls: int, clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    for _ in range(calls):
        function()
    return (clock() - start) / calls


def _others() -> float:
    """The seconds of processor time that others than this process have taken since the machine started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    own = os.times()
    return (user + nice + system + irq + softirq + steal) * TICK - own.user - own.system
