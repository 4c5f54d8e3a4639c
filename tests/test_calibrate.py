"""Measuring a device: what is read off times that are known, and what is kept. No time is compared with a clock."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import fxreuse
from fxreuse.cost_model import calibrate, microbenchmarks, read_times
from fxreuse.cost_model.device import PRODUCTS, USES, Device, Rate
from fxreuse.cost_model.presets import SERVER_CPU


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibrate.kept.cache_clear()
    yield tmp_path
    calibrate.kept.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands in for the measurement; what it gives is counted up."""
    made: list[int] = []

    def measure(progress: Callable[[str], None] | None = None) -> Device:
        made.append(len(made))
        return dataclasses.replace(SERVER_CPU, threads=torch.get_num_threads(), memory=1e9 + made[-1])

    monkeypatch.setattr(calibrate, "calibrate", measure)
    return made


def test_a_machine_is_measured_once(calls: list[int], own_cache: Path) -> None:
    first = Device.measure()
    assert Device.of("cpu") == Device.of(torch.device("cpu")) == first
    calibrate.kept.cache_clear()  # as in another process
    assert Device.measure() == first == Device.typical_cpu()
    assert calls == [0]
    assert len(list(own_cache.glob("fxreuse/device-*.json"))) == 1


def test_it_is_measured_again_when_asked_for(calls: list[int]) -> None:
    assert Device.measure().memory == 1e9
    assert Device.measure(again=True).memory == 1e9 + 1
    assert Device.measure().memory == 1e9 + 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"products": {}}', "null"])
def test_what_cannot_be_read_is_measured_anew(calls: list[int], text: str) -> None:
    path = calibrate.cache_file(torch.get_num_threads())
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert Device.typical_cpu() == SERVER_CPU
    assert Device.measure().memory == 1e9


def test_a_cache_that_cannot_be_written_does_no_harm(calls: list[int], own_cache: Path) -> None:
    (own_cache / "fxreuse").write_text("a file in the way")
    assert Device.measure().memory == 1e9


def test_every_number_of_threads_has_its_own_measurement() -> None:
    assert len({calibrate.cache_file(threads) for threads in (1, 2, 3)}) == 3


def test_nothing_is_measured_to_decide_by(calls: list[int]) -> None:
    assert Device.typical_cpu() == SERVER_CPU
    assert calls == []


def test_another_default_dtype_is_refused() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(fxreuse.UnsupportedError, match=r"default dtype is torch.float64"):
            calibrate.calibrate()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "rate", [Rate(5e10), Rate(9e10, (0.0, 12.0, 30.0)), Rate(2e9, (4.0, 0.0, 0.0))], ids=lambda rate: str(rate.half)
)
def test_the_rate_that_times_follow_is_found(rate: Rate) -> None:
    shapes = [(batch, m, n, k) for batch, m, k, n in microbenchmarks.BATCHED]
    found = read_times.read_rate(shapes, [rate.seconds(*shape) for shape in shapes])
    for batch, m, n, k in ((4, 300, 300, 64), (12, 512, 64, 512), (1, 100, 2000, 96)):
        assert found.seconds(batch, m, n, k) == pytest.approx(rate.seconds(batch, m, n, k), rel=0.05)


def test_what_fused_attention_spends_on_scores_products_and_packing_is_told_apart() -> None:
    rate, score = Rate(8e10, (20.0, 0.0, 0.0), 0.2), 2e-10
    device = dataclasses.replace(SERVER_CPU, products={"attention": rate})
    times = {}
    for case in microbenchmarks.ATTENTION:
        batch, heads, length, width = case
        products = device.product("attention", batch * heads, length, length, 2 * width, torch.float32)
        times[f"attention {case}"] = products + score * batch * heads * length**2
    found_score, found = read_times.read_attention(times, 0.0)
    assert found_score == pytest.approx(score, rel=1e-6)
    assert (found.macs, found.half[0], found.ragged) == pytest.approx((8e10, 20.0, 0.2), rel=1e-6)


def times_of_memory(own: float, shared: float, idle: float) -> dict[str, float]:
    """Copies at 160, 80 and 20 GB/s, and a block that takes 1 ms, or two from so many seconds of pause on."""

    def rate(size: int) -> float:
        return 160e9 if size < own else 80e9 if size < shared else 20e9

    times = {f"copy {size}": size * 2**20 / rate(size) for size in microbenchmarks.COPIED}
    return times | {f"idle {pause}": 2e-3 if pause >= idle else 1e-3 for pause in (0.0, *read_times.PAUSES)}


def test_a_cache_ends_where_copies_have_become_slower_by_half() -> None:
    cache_rate, memory, caches = read_times.read_caches(times_of_memory(5, 100, math.inf))
    assert (cache_rate, memory) == pytest.approx((80e9, 20e9))
    assert 4 * 2**20 < caches.own < 5 * 2**20
    assert 96 * 2**20 < caches.shared < 128 * 2**20


@pytest.mark.parametrize(("idle", "expected"), [(0.016, 0.012), (0.064, 0.048), (math.inf, math.inf)])
def test_a_cache_keeps_what_is_not_used_until_half_of_it_is_gone(idle: float, expected: float) -> None:
    assert read_times.read_caches(times_of_memory(5, 100, idle))[2].retention == pytest.approx(expected)


def test_bytes_from_memory_cost_what_they_take_longer_than_from_cache() -> None:
    per_byte = {"copy": 2e-11, "write": 3e-11, "linear": 4e-11, "batched": 7e-11}
    times = {
        f"{use}, {place}": size // 2 * (1e-3 + per_byte[use] * microbenchmarks.MOVED[use] * (place == "memory"))
        for use in per_byte
        for place, size in microbenchmarks.PLACES.items()
    }
    found = read_times.read_misses(times)
    assert found == pytest.approx({"read": 1e-11, "write": 3e-11, "linear": 4e-11, "batched": 7e-11})
    assert set(found) == set(USES)


def test_the_shortest_of_several_times_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now, steps = [0.0], iter([*[5.0] * 2, *[3.0, 2.0, 4.0] * 100])

    def run() -> None:
        now[0] += next(steps)

    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: now[0])
    assert calibrate.shortest(run, budget=20.0) == 2.0


def test_a_whole_measurement_has_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round of as few calls as there can be; the figures are too rough for anything else than to be there."""
    monkeypatch.setattr(calibrate, "_ROUNDS", 1)
    monkeypatch.setattr(calibrate, "_BUDGET", 0.0)
    monkeypatch.setattr(calibrate, "_CALLS", 4)
    seeds, said = torch.get_rng_state(), []
    device = calibrate.calibrate(said.append)
    assert torch.equal(torch.get_rng_state(), seeds)
    assert len(said) == 1
    assert set(device.products) == set(PRODUCTS)
    assert set(device.elements) == set(SERVER_CPU.elements)
    assert set(device.overhead) == set(SERVER_CPU.overhead)
    assert set(device.dtypes) == set(SERVER_CPU.dtypes)
    assert set(device.memory_miss) == set(SERVER_CPU.memory_miss) == set(USES)
    figures = [
        device.memory,
        device.cache,
        device.cache_rate,
        device.own_cache,
        *device.elements.values(),
        *device.dtypes.values(),
    ]
    figures += [rate.macs for rate in device.products.values()]
    assert all(0 < figure < math.inf for figure in figures)
    assert Device.from_json(device.to_json()) == device
