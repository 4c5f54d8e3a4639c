"""Measuring a CPU for the latency model: microbenchmarks, and the constants of `Device` that fit them.

Nothing here is a model, or a layer of one. Every time is the shortest of several, so that what else the machine does is
not taken for the machine.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedError
from ..map_workspace import attention_map
from .device import Device, Rate
from .fit import fit_times

Run = Callable[[], object]
# Batch, m, n and k of a product.
Sizes = tuple[int, int, int, int]

_aten = torch.ops.aten
# The form of what is kept in the cache directory; it counts up when a measurement changes.
_FORMAT = 1
# All microbenchmarks are gone through so many times, each for so many seconds and at least two calls; a round that
# would end later than this many seconds after the start is left out.
_ROUNDS, _BUDGET, _LONGEST = 3, 0.015, 8.5
_MIB = 2**20
# Calls that are timed one by one, and the bytes that are touched between them.
_CALLS, _BETWEEN = 20, 12 * _MIB

# m, k, n of products with weights.
_LINEAR = (
    (96, 256, 256), (96, 1024, 384), (384, 256, 1024), (384, 384, 1536), (384, 1536, 384), (160, 768, 640),
    (160, 640, 2560), (1536, 320, 320), (1536, 320, 1280), (768, 2048, 512),
)  # fmt: skip
# batch, m, k, n of batches of products: scores, and maps with values.
_BATCHED = (
    (4, 96, 64, 96), (4, 384, 64, 384), (12, 256, 64, 256), (4, 896, 64, 896), (8, 640, 48, 640),
    (4, 96, 96, 64), (4, 384, 384, 64), (12, 256, 256, 64), (4, 896, 896, 64), (8, 640, 640, 48),
)  # fmt: skip
# batch, heads, length, width of fused attentions.
_ATTENTION = (
    (1, 4, 96, 64),
    (1, 4, 384, 64),
    (1, 4, 640, 32),
    (1, 4, 640, 128),
    (1, 12, 256, 64),
    (1, 4, 1280, 64),
    (1, 4, 512, 16),
)
# channels in, channels out, length, kernel, stride, groups of convolutions.
_CONVOLUTION = (
    (256, 512, 384, 1, 1, 1), (320, 320, 640, 1, 1, 1), (384, 384, 2000, 3, 2, 1), (1, 384, 12000, 10, 5, 1),
    (320, 320, 1200, 2, 2, 1), (640, 640, 192, 96, 1, 16), (384, 384, 384, 64, 1, 8),
)  # fmt: skip
_DEPTHWISE = (
    (256, 256, 384, 31, 1, 256),
    (384, 384, 768, 15, 1, 384),
    (192, 192, 1200, 31, 1, 192),
    (320, 320, 160, 23, 1, 320),
)
# Two products of which the second has rows that do not end with a line of cache.
_RAGGED = ((4, 768, 64, 1024), (4, 768, 64, 1023))
# What a mask costs is read off this one.
_MASKED = torch.Size((1, 4, 512, 64))
# MiB that copies touch, from what the cache of a core does not hold alone to what the last-level cache does not hold.
_COPIED = (6, 9, 12, 16, 24, 32, 48, 96)
# Bytes of a block that is taken from the system anew every time.
_FILLED = 48 * _MIB
_DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
# Elements of the tensors that each kind is measured on.
_ELEMENTS = dict.fromkeys(
    ("gelu", "silu", "tanh", "softmax", "layer_norm", "batch_norm", "group_norm", "strided"), 384 * 1024
) | {"add": 96 * 1024}


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
    identity = (_FORMAT, platform.node(), _processor(), os.cpu_count(), torch.__version__, threads)
    name = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    return Path(root) / "fxreuse" / f"device-{name}.json"


def _processor() -> str:
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
    return read_device(measure_times(progress))


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
        calls = _calls()
        works = {**_memory(), **_products(), **_attentions(), **_elements(), **_in_dtypes()}
        return _measure(calls, works, progress or (lambda text: None))


def read_device(times: Mapping[str, float]) -> Device:
    """The constants that fit the times of microbenchmarks."""
    calls = [name.removeprefix("call ") for name in times if name.startswith("call ")]
    overhead = {name: times[f"call {name}"] for name in calls}
    loop = {name: times[f"loop {name}"] for name in calls}  # what microbenchmarks have to be freed of
    overhead |= {"compiled view": 0.0, "compiled module": 0.0, "compiled batched": overhead["compiled linear"]}
    cache_rate, memory, cache = _read_memory(times)
    score, attention = _read_attention(times, loop["attention"])
    masked = max(0.0, times["attention, mask"] - times["attention, no mask"]) / (
        _MASKED[0] * _MASKED[1] * _MASKED[2] ** 2
    )
    return Device(
        name=_processor(),
        kind="cpu",
        threads=int(times["threads"]),
        products={
            "linear": _read_rate("linear", _LINEAR, _linear_sizes, times, loop["linear"]),
            "batched": _read_rate("batched", _BATCHED, _batched_sizes, times, loop["batched"]),
            "convolution": _read_rate("convolution", _CONVOLUTION, _convolution_sizes, times, loop["convolution"]),
            "depthwise": _read_rate("convolution", _DEPTHWISE, _convolution_sizes, times, loop["convolution"]),
            "attention": attention,
        },
        dtypes={name: times["in float32"] / times[f"in {name}"] for name in _DTYPES},
        elements={
            name: max(times[f"element {name}"] - loop["element"], times[f"element {name}"] / 4) / count
            for name, count in _ELEMENTS.items()
        },
        score=score,
        masked_score=masked,
        memory=memory,
        cache=cache,
        cache_rate=cache_rate,
        overhead=overhead,
        fault=max(0.0, times["fill, new"] - times["fill"]) / _FILLED,
        ragged=_read_ragged(times, cache),
        source=f"measured with {times['threads']:.0f} threads, torch {torch.__version__}",
    )


def _measure(calls: Mapping[str, Run], works: Mapping[str, Run], say: Callable[[str], None]) -> dict[str, float]:
    """The seconds of each, the shortest of rounds that lie seconds apart: what disturbs one round spares another."""
    times: dict[str, float] = {"threads": torch.get_num_threads()}
    begun = start = time.perf_counter()
    for number in range(_ROUNDS):
        if number and 2 * time.perf_counter() - start - begun > _LONGEST:
            break
        start = time.perf_counter()
        say(f"measuring this processor with {torch.get_num_threads()} threads, round {number + 1} of {_ROUNDS}")
        for name, run in calls.items():
            times[f"call {name}"] = min(times.get(f"call {name}", math.inf), among_others(run))
            times[f"loop {name}"] = min(times.get(f"loop {name}", math.inf), shortest(run, _BUDGET / 5))
        for name, run in works.items():
            times[name] = min(times.get(name, math.inf), shortest(run))
    return times


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

    A quarter of the calls were quicker than this.
    """
    data = torch.zeros(_BETWEEN // 4)
    times = []
    run()
    for _ in range(_CALLS):
        data.neg_()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[_CALLS // 4]


def _calls() -> dict[str, Run]:
    """Each kind of call on next to no data."""
    row, query = torch.zeros(1, 8), torch.zeros(1, 1, 4, 8)
    linear, dropout = torch.nn.Linear(8, 8).eval(), torch.nn.Dropout().eval()
    convolution = torch.nn.Conv1d(8, 8, 3).eval()
    norm, batch_norm = torch.nn.LayerNorm(8), torch.nn.BatchNorm1d(8).eval()
    signal, result = torch.zeros(1, 8, 8), torch.zeros(1, 8)
    matrix = linear.weight.detach()

    def attention() -> Tensor:
        return _aten.scaled_dot_product_attention.default(query, query, query)

    def stored() -> Tensor:
        return attention_map(query, query, None, False, 1.0)

    return {
        "view": lambda: _aten.reshape.default(row, [8]),
        "module": lambda: dropout(row),
        "norm": lambda: norm(row),
        "batch norm": lambda: batch_norm(signal),
        "element": lambda: _aten.add.Tensor(row, row),
        "linear": lambda: linear(row),
        "batched": lambda: _aten.matmul.default(query, query.transpose(-1, -2)),
        "convolution": lambda: convolution(signal),
        "attention": attention,
        "map": stored,
        "compiled element": lambda: torch.add(row, row, out=result),
        "compiled linear": lambda: torch.mm(row, matrix, out=result),
        "compiled attention": attention,
        "compiled convolution": lambda: convolution(signal),
        "compiled map": stored,
    }


def _memory() -> dict[str, Run]:
    """Copies of several sizes, each touched twice over: once read, once written; and a block that is new every time."""
    runs: dict[str, Run] = {}
    for size in _COPIED:
        source = torch.zeros(size * _MIB // 8)
        target = torch.zeros_like(source)
        runs[f"copy {size}"] = functools.partial(target.copy_, source)
    kept = torch.zeros(_FILLED // 4)
    runs["fill"] = lambda: kept.fill_(0.0)
    runs["fill, new"] = lambda: torch.empty(_FILLED // 4).fill_(0.0)
    return runs


def _read_memory(times: Mapping[str, float]) -> tuple[float, float, float]:
    """Bytes per second in the last-level cache and beyond it, and the size up to which a copy is as fast as in it."""
    rates = {size: size * _MIB / times[f"copy {size}"] for size in _COPIED}
    inside, outside = rates[_COPIED[0]], rates[_COPIED[-1]]
    middle = math.sqrt(inside * outside)
    return inside, outside, float(max(size for size, rate in rates.items() if rate >= middle) * _MIB)


def _products() -> dict[str, Run]:
    runs: dict[str, Run] = {}
    for m, k, n in _LINEAR:
        runs[f"linear {(m, k, n)}"] = functools.partial(torch.nn.Linear(k, n), torch.randn(m, k))
    for batch, m, k, n in (*_BATCHED, *_RAGGED):
        right = torch.randn(batch, n, k).transpose(1, 2) if k < n else torch.randn(batch, k, n)
        out = torch.empty(batch, m, n)
        runs[f"batched {(batch, m, k, n)}"] = functools.partial(torch.bmm, torch.randn(batch, m, k), right, out=out)
    for inputs, outputs, length, kernel, stride, groups in (*_CONVOLUTION, *_DEPTHWISE):
        padding = kernel // 2 if stride == 1 else 0
        layer = torch.nn.Conv1d(inputs, outputs, kernel, stride, padding, groups=groups)
        signal = torch.randn(1, inputs, length if padding else length + kernel - 1)
        runs[f"convolution {(inputs, outputs, length, kernel, stride, groups)}"] = functools.partial(layer, signal)
    return runs


def _linear_sizes(m: int, k: int, n: int) -> Sizes:
    return 1, m, n, k


def _batched_sizes(batch: int, m: int, k: int, n: int) -> Sizes:
    return batch, m, n, k


def _convolution_sizes(inputs: int, outputs: int, length: int, kernel: int, stride: int, groups: int) -> Sizes:
    positions = (length - 1) // stride + 1 if stride > 1 or kernel % 2 else length + 1
    return groups, positions, outputs // groups, inputs // groups * kernel


def _read_rate(
    family: str,
    cases: Sequence[tuple[int, ...]],
    sizes: Callable[..., Sizes],
    times: Mapping[str, float],
    overhead: float,
) -> Rate:
    """The rate of the best case, and the half sizes that fit what the others take longer."""
    terms, spent = [], []
    for case in cases:
        batch, m, n, k = sizes(*case)
        terms.append((batch * m * n * k, batch * n * k, batch * m * k, batch * m * n))
        seconds = times[f"{family} {case}"]
        spent.append(max(seconds - overhead, seconds / 4))
    best = max(macs / seconds for (macs, *_), seconds in zip(terms, spent, strict=True))
    extra = fit_times([others for _, *others in terms], spent, [macs / best for macs, *_ in terms])
    of_m, of_n, of_k = (seconds * best for seconds in extra)
    return Rate(best, (of_m, of_n, of_k))


def _read_ragged(times: Mapping[str, float], cache: float) -> float:
    """Seconds per element that rows which share lines of cache take, once the result fills the cache."""
    (batch, m, _, n), other = _RAGGED
    even, ragged = (times[f"batched {case}"] / math.prod(case) for case in (_RAGGED[0], other))
    k = other[2]
    return max(0.0, ragged - even) * k / min(1.0, 4 * batch * m * n / cache)


def _attentions() -> dict[str, Run]:
    runs: dict[str, Run] = {}
    for case in _ATTENTION:
        batch, heads, length, width = case
        query, key, value = torch.randn(3, batch, length, heads, width).transpose(2, 3)
        runs[f"attention {case}"] = functools.partial(F.scaled_dot_product_attention, query, key, value)
    batch, heads, length, width = _MASKED
    query, key, value = torch.randn(3, batch, length, heads, width).transpose(2, 3)
    mask = torch.zeros(batch, heads, length, length)
    runs["attention, no mask"] = lambda: F.scaled_dot_product_attention(query, key, value)
    runs["attention, mask"] = lambda: F.scaled_dot_product_attention(query, key, value, mask)
    return runs


def _read_attention(times: Mapping[str, float], overhead: float) -> tuple[float, Rate]:
    """Seconds per score of fused attention, and the rate of its products."""
    terms, spent = [], []
    for case in _ATTENTION:
        batch, heads, length, width = case
        scores = batch * heads * length**2
        terms.append((scores * 2 * width, scores))
        seconds = times[f"attention {case}"]
        spent.append(max(seconds - overhead, seconds / 4))
    per_mac, score = fit_times(terms, spent)
    best = max(macs / seconds for (macs, _), seconds in zip(terms, spent, strict=True))
    return score, Rate(min(1 / per_mac, 2 * best) if per_mac else 2 * best)


def _elements() -> dict[str, Run]:
    """Operators that are no products, on tensors that stay in cache."""
    data, other = torch.randn(1, 384, 1024), torch.randn(1, 384, 1024)
    turned = torch.randn(1, 1024, 384).transpose(1, 2)
    weight, norm = torch.ones(1024), torch.nn.BatchNorm1d(384).eval()
    small = torch.randn(96, 1024)
    runs: dict[str, Run] = {
        "add": lambda: torch.add(small, small),
        "gelu": lambda: F.gelu(data),
        "silu": lambda: F.silu(data),
        "tanh": lambda: torch.tanh(data),
        "softmax": lambda: torch.softmax(data, -1),
        "layer_norm": lambda: F.layer_norm(data, (1024,), weight, weight),
        "batch_norm": lambda: norm(data),
        "group_norm": lambda: F.group_norm(other, 384),
        "strided": lambda: turned.contiguous(),
    }
    return {f"element {name}": run for name, run in runs.items()}


def _in_dtypes() -> dict[str, Run]:
    """A product of middling size in every dtype."""
    left, right = torch.randn(256, 256), torch.randn(256, 384)
    return {
        f"in {name}": functools.partial(torch.matmul, left.to(dtype), right.to(dtype))
        for name, dtype in _DTYPES.items()
    }
