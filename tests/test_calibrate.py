"""Measuring a device: what is read off times that are known, and what is kept. No time is compared with a clock."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import fxreuse
from fxreuse.cost_model import calibrate
from fxreuse.cost_model.device import PRODUCTS, Device, Rate
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
    times = {}
    for case in calibrate._BATCHED:
        batch, m, k, n = case
        times[f"batched {case}"] = rate.seconds(batch, m, n, k) + 5e-6
    found = calibrate._read_rate("batched", calibrate._BATCHED, calibrate._batched_sizes, times, 5e-6)
    for batch, m, n, k in ((4, 300, 300, 64), (12, 512, 64, 512), (1, 100, 2000, 96)):
        assert found.seconds(batch, m, n, k) == pytest.approx(rate.seconds(batch, m, n, k), rel=0.2)


def test_scores_and_products_of_fused_attention_are_told_apart() -> None:
    rate, score = 8e10, 2e-10
    times = {}
    for case in calibrate._ATTENTION:
        batch, heads, length, width = case
        times[f"attention {case}"] = batch * heads * length**2 * (2 * width / rate + score)
    found_score, found = calibrate._read_attention(times, 0.0)
    assert found_score == pytest.approx(score, rel=1e-6)
    assert found.macs == pytest.approx(rate, rel=1e-6)


def test_the_cache_ends_where_copies_become_slower() -> None:
    rates = {size: 80e9 if size <= 16 else 20e9 for size in calibrate._COPIED}
    times = {f"copy {size}": size * 2**20 / rate for size, rate in rates.items()}
    assert calibrate._read_memory(times) == (pytest.approx(80e9), pytest.approx(20e9), 16 * 2**20)


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
    figures = [device.memory, device.cache, device.cache_rate, *device.elements.values(), *device.dtypes.values()]
    figures += [rate.macs for rate in device.products.values()]
    assert all(0 < figure < math.inf for figure in figures)
    assert Device.from_json(device.to_json()) == device
