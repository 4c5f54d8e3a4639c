"""The constants of `Device` that fit the times of microbenchmarks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from . import microbenchmarks as of
from .device import Device, Rate, block_work
from .fit import fit_times
from .residency import Caches

# Batch, m, n and k of a product.
Sizes = tuple[int, int, int, int]
# Seconds that `of.IDLE` is left alone.
PAUSES = (0.004, 0.008, 0.016, 0.032, 0.064)
# Where a block that was left alone for long takes less than so many times as long as one that was not, nobody else
# uses the last-level cache.
_ALONE = 1.2


def read_device(times: Mapping[str, float], name: str) -> Device:
    """The CPU of this name that microbenchmarks took these seconds on."""
    calls = [name.removeprefix("call ") for name in times if name.startswith("call ")]
    overhead = {name: times[f"call {name}"] for name in calls}
    loop = {name: times[f"loop {name}"] for name in calls}  # what microbenchmarks have to be freed of
    overhead |= {"compiled view": 0.0, "compiled module": 0.0, "compiled batched": overhead["compiled linear"]}
    cache_rate, memory, caches = read_caches(times)

    def rate(family: str, cases: Sequence[tuple[int, ...]], sizes: Callable[..., Sizes]) -> Rate:
        spent = [max(times[f"{family} {case}"] - loop[family], times[f"{family} {case}"] / 4) for case in cases]
        return read_rate([sizes(*case) for case in cases], spent)

    score, attention = read_attention(times, loop["attention"])
    ragged, ragged_memory = _read_ragged(times)
    return Device(
        name=name,
        kind="cpu",
        threads=int(times["threads"]),
        products={
            "linear": rate("linear", of.LINEAR, _linear_sizes),
            "batched": rate("batched", of.BATCHED, _batched_sizes),
            "convolution": rate("convolution", of.CONVOLUTION, _convolution_sizes),
            "depthwise": rate("convolution", of.DEPTHWISE, _convolution_sizes),
            "attention": attention,
        },
        dtypes={name: times["in float32"] / times[f"in {name}"] for name in of.DTYPES},
        elements={
            name: max(times[f"element {name}"] - loop["element"], times[f"element {name}"] / 4) / count
            for name, count in of.ELEMENTS.items()
        },
        score=score,
        masked_score=_read_mask(times),
        memory=memory,
        cache=caches.shared,
        cache_rate=cache_rate,
        own_cache=caches.own,
        retention=caches.retention,
        outer_miss=max(0.0, 1 / cache_rate - _per_byte(times, of.COPIED[0])),
        memory_miss=read_misses(times),
        overhead=overhead,
        fault=max(0.0, times["fill, new"] - times["fill"]) / of.FILLED,
        ragged=ragged,
        ragged_memory=ragged_memory,
        source=f"measured with {times['threads']:.0f} threads, torch {torch.__version__}",
    )


def _linear_sizes(m: int, k: int, n: int) -> Sizes:
    return 1, m, n, k


def _batched_sizes(batch: int, m: int, k: int, n: int) -> Sizes:
    return batch, m, n, k


def _convolution_sizes(inputs: int, outputs: int, length: int, kernel: int, stride: int, groups: int) -> Sizes:
    positions = (length - 1) // stride + 1 if stride > 1 or kernel % 2 else length + 1
    return groups, positions, outputs // groups, inputs // groups * kernel


def read_caches(times: Mapping[str, float]) -> tuple[float, float, Caches]:
    """Bytes per second in the last-level cache and beyond it, and what is in which cache for how long."""
    sizes = [size * of.MIB for size in of.COPIED]
    each = [_per_byte(times, size) for size in of.COPIED]
    middle = _per_byte(times, of.PLACES["cache"])
    own = _crossing(sizes, each, (each[0] + middle) / 2)
    shared = _crossing(sizes, each, (middle + each[-1]) / 2)
    return 1 / middle, 1 / each[-1], Caches(own, shared, _read_retention(times))


def _per_byte(times: Mapping[str, float], size: int) -> float:
    """Seconds per byte of a copy that touches so many MiB."""
    return times[f"copy {size}"] / (size * of.MIB)


def _crossing(at: Sequence[float], values: Sequence[float], wanted: float) -> float:
    """Where values that grow reach one that is wanted; at the end where they do not."""
    for (left, low), (right, high) in itertools.pairwise(zip(at, values, strict=True)):
        if low <= wanted <= high and high > low:
            return left + (right - left) * (wanted - low) / (high - low)
    return at[-1]


def _read_retention(times: Mapping[str, float]) -> float:
    """After how many seconds half of a block is gone from the last-level cache."""
    waited = (0.0, *PAUSES)
    found = [times[f"idle {pause}"] for pause in waited]
    if max(found) < _ALONE * found[0]:
        return math.inf
    return _crossing(waited, found, (found[0] + max(found)) / 2)


def read_misses(times: Mapping[str, float]) -> dict[str, float]:
    """Seconds per byte that comes from memory, or goes there, beyond what it takes in the last-level cache, by use."""
    found = {}
    for use, moved in of.MOVED.items():
        cached, far = (times[f"{use}, {place}"] / (size // of.PIECE) for place, size in of.PLACES.items())
        found[use] = max(0.0, far - cached) / moved
    found["read"] = max(0.0, 2 * found.pop("copy") - found["write"])  # a copy reads as much as it writes
    return found


def read_rate(shapes: Sequence[Sizes], seconds: Sequence[float]) -> Rate:
    """The rate and the half sizes that fit the times of products best."""
    terms = [(batch * m * n * k, batch * n * k, batch * m * k, batch * m * n) for batch, m, n, k in shapes]
    per_mac, *extra = fit_times(terms, seconds)
    if not per_mac:
        per_mac = min(spent / macs for (macs, *_), spent in zip(terms, seconds, strict=True))
    of_m, of_n, of_k = (each / per_mac for each in extra)
    return Rate(1 / per_mac, (of_m, of_n, of_k))


def _read_ragged(times: Mapping[str, float]) -> tuple[float, float]:
    """Seconds per element of a result whose rows share lines of cache, and what more where it comes from memory."""
    even, ragged = (times[f"batched {case}"] / math.prod(case) for case in of.RAGGED)
    near = max(0.0, ragged - even) * of.RAGGED[1][2]
    pieces = of.PLACES["memory"] // of.PIECE
    even, ragged = (times[f"scores {columns}, memory"] / (pieces * 1024 * columns) for columns in of.RAGGED_FAR)
    return near, max(0.0, ragged - even - near)


def _read_mask(times: Mapping[str, float]) -> float:
    """Seconds per score of a mask in memory."""
    batch, heads, length, _ = of.MASKED
    return max(0.0, times["attention, mask"] - times["attention, no mask"]) / (batch * heads * length**2)


def read_attention(times: Mapping[str, float], overhead: float) -> tuple[float, Rate]:
    """Seconds per score of fused attention, and the rate of its products."""
    terms, spent = [], []
    for case in of.ATTENTION:
        batch, heads, length, width = case
        terms.append((*block_work(batch * heads, length, length, max(2 * width, 64)), batch * heads * length**2))
        seconds = times[f"attention {case}"]
        spent.append(max(seconds - overhead, seconds / 4))
    per_mac, packed, ragged, score = fit_times(terms, spent)
    if not per_mac:
        per_mac = min(seconds / (2 * macs) for (macs, *_), seconds in zip(terms, spent, strict=True))
    return score, Rate(1 / per_mac, (packed / per_mac, 0.0, 0.0), ragged / per_mac)
