"""Measuring a CPU for the latency model, and keeping what was found.

Every time is the shortest of several, so that what else the machine does is not taken for the machine.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ..errors import UnsupportedError
from . import microbenchmarks
from .device import Device
from .microbenchmarks import MIB, Run
from .read_times import PAUSES, read_device

# The form of what is kept in the cache directory; it counts up when a measurement changes.
_FORMAT = 2
# All microbenchmarks are gone through so many times, each for so many seconds and at least two calls; a round that
# would end later than this many seconds after the start is left out.
_ROUNDS, _BUDGET, _LONGEST = 3, 0.012, 9.0
# Calls that are timed one by one, and the bytes that are touched between them.
_CALLS, _BETWEEN = 32, 12 * MIB
# How often a block is used after each pause.
_USES_AFTER = 3


def measured(*, again: bool = False, progress: Callable[[str], None] | None = None) -> Device:
    """See `Device.measure`."""
    threads = torch.get_num_threads()
    if not again and (found := kept(threads)) is not None:
        return found
    device = calibrate(progress)
    _keep(device)
    kept.cache_clear()
    return device


def cache_file(threads: int) -> Path:
    """Where the measurement of this machine with so many threads is kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    identity = (_FORMAT, platform.node(), processor(), os.cpu_count(), torch.__version__, threads)
    name = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    return Path(root) / "fxreuse" / f"device-{name}.json"


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.lru_cache
def kept(threads: int) -> Device | None:
    """What was measured earlier; None where there is nothing that can be read."""
    try:
        return Device.from_json(cache_file(threads).read_text())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _keep(device: Device) -> None:
    """Write a measurement down, where that is possible; whole or not at all."""
    path = cache_file(device.threads)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(device.to_json())
        part.replace(path)
    except OSError:
        return


def calibrate(progress: Callable[[str], None] | None = None) -> Device:
    """Measure the CPU with the threads that torch has now, in less than ten seconds.

    Raises:
        UnsupportedError: torch works with other numbers than float32 by default.
    """
    return read_device(measure_times(progress), processor())


@torch.no_grad()
def measure_times(progress: Callable[[str], None] | None = None) -> dict[str, float]:
    """The seconds of every microbenchmark, by name; see `calibrate`."""
    if torch.get_default_dtype() != torch.float32:
        raise UnsupportedError(
            f"A device is measured in float32, but torch's default dtype is {torch.get_default_dtype()}. "
            "Set it back with torch.set_default_dtype(torch.float32) first."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _measure(progress or (lambda text: None))


def _measure(say: Callable[[str], None]) -> dict[str, float]:
    """The seconds of each, the shortest of rounds that lie seconds apart: what disturbs one round spares another."""
    calls, works, far = microbenchmarks.calls(), microbenchmarks.works(), microbenchmarks.far_works()
    alone = microbenchmarks.idle_work()
    times: dict[str, float] = {"threads": torch.get_num_threads()}

    waited: defaultdict[str, list[float]] = defaultdict(list)  # what others do meanwhile is not to be left out

    def keep(found: Mapping[str, float]) -> None:
        times.update({name: min(times.get(name, math.inf), seconds) for name, seconds in found.items()})

    begun = start = time.perf_counter()
    for number in range(_ROUNDS):
        if number and 2 * time.perf_counter() - start - begun > _LONGEST:
            break
        start = time.perf_counter()
        say(f"measuring this processor with {torch.get_num_threads()} threads, round {number + 1} of {_ROUNDS}")
        keep({f"call {name}": among_others(run) for name, run in calls.items()})
        keep({f"loop {name}": shortest(run, _BUDGET / 5) for name, run in calls.items()})
        keep({name: shortest(run) for name, run in works.items()})
        keep({name: shortest(run) for name, run in far.items()})
        for pause in (0.0, *PAUSES):
            waited[f"idle {pause}"] += after_pause(alone, pause)
    return times | {name: statistics.median(seconds) for name, seconds in waited.items()}


def shortest(run: Run, budget: float = _BUDGET) -> float:
    """Seconds per call: the shortest of several goes, each long enough for the clock."""
    run()
    start = time.perf_counter()
    run()
    once = max(time.perf_counter() - start, 1e-7)
    calls = max(1, int(budget / 8 / once))
    best, end = once, time.perf_counter() + budget
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def among_others(run: Run) -> float:
    """Seconds of a call on next to no data between others that use the cache: in a loop of its own it would look cheap.

    An eighth of the calls were quicker than this; more than half may be slowed down by others.
    """
    data = torch.zeros(_BETWEEN // 4)
    times = []
    run()
    for _ in range(_CALLS):
        data.neg_()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[_CALLS // 8]


def after_pause(run: Run, seconds: float) -> list[float]:
    """Seconds of some calls, each some time after the one before: this process works, but touches next to nothing."""
    times = []
    run()
    for _ in range(_USES_AFTER):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times
