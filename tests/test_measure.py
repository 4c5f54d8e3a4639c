"""Timing and memory: what they count is checked against cases counted by hand, never a time against a clock."""

import os

import pytest
import torch

from fxreuse.checking.measure import Spread, Timing, interleaved, peak_memory
from fxreuse.map_workspace import attention_map

KIB = 1024


def test_rounds_are_interleaved_and_their_order_is_reversed():
    called = []
    functions = {name: lambda name=name: called.append(name) for name in "abc"}
    timings = interleaved(functions, seconds=0.0, rounds=3)
    assert list(timings) == ["a", "b", "c"]
    assert {timing.calls for timing in timings.values()} == {1}
    assert {len(timing.rounds) for timing in timings.values()} == {3}
    assert "".join(called[-9:]) == "abccbaabc"


def test_more_time_means_more_calls_in_a_round():
    timing = interleaved({"f": lambda: None}, seconds=0.05, rounds=2)["f"]
    assert timing.calls > 1
    assert all(value > 0 for value in timing.rounds)


def test_the_threads_of_the_process_stay_as_they_are():
    seen, before = set(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        interleaved({"f": lambda: seen.add(torch.get_num_threads())}, seconds=0.0, rounds=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {2}


@pytest.mark.parametrize(("functions", "rounds"), [({}, 3), ({"f": int}, 0)])
def test_nothing_to_time_is_an_error(functions, rounds):
    with pytest.raises(ValueError, match="expected functions to time and rounds ≥ 1"):
        interleaved(functions, rounds=rounds)


def test_errors_of_a_timed_function_are_raised():
    with pytest.raises(ZeroDivisionError):
        interleaved({"f": lambda: 1 // 0}, rounds=1)


def test_quartiles_lie_between_the_values():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.25, 1.75)
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)


def test_a_speedup_compares_round_by_round():
    quick, slow = Timing((1.0, 2.0, 4.0), 1), Timing((3.0, 6.0, 12.0), 1)
    assert quick.speedup_over(slow) == Spread(3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.50 s (2.50 to 2.50)"), (0.01234, "12.3 ms (12.3 to 12.3)"), (123.4e-6, "123 µs (123 to 123)")],
)
def test_times_are_shown_in_their_unit(seconds, text):
    assert str(Timing((seconds,), 1)) == text


def step_by_step():
    first = torch.zeros(1000 * KIB, dtype=torch.uint8)
    second = torch.cat([first, first])  # 3000 KiB are held here
    del first
    third = second[: 500 * KIB].clone()  # 2500 KiB
    del second
    return third.view(5, -1)


def test_peak_memory_is_what_is_held_at_a_time():
    assert peak_memory(step_by_step) == 3000 * KIB


def test_peak_memory_counts_the_result():
    assert peak_memory(lambda: [torch.zeros(KIB, dtype=torch.uint8) for _ in range(3)]) == 3 * KIB


def test_peak_memory_is_above_what_was_held_before():
    held = [torch.zeros(100 * KIB, dtype=torch.uint8) for _ in range(2)]

    def let_go():
        held.pop()
        return torch.zeros(10 * KIB, dtype=torch.uint8)

    assert peak_memory(let_go) == 10 * KIB
    assert peak_memory(lambda: None) == 0


def test_what_an_earlier_measured_call_left_counts_for_nothing():
    left = []
    peak_memory(lambda: left.append(torch.zeros(100 * KIB, dtype=torch.uint8)))

    def let_go():
        left.pop(0)
        return torch.zeros(10 * KIB, dtype=torch.uint8)

    assert peak_memory(let_go) == 10 * KIB


def test_peak_memory_counts_the_storage_of_maps_each_time():
    query = torch.zeros(1, 4, 512, 8)
    calls = [lambda: attention_map(query, query, None, False, 1.0)] * 2
    assert [peak_memory(call) for call in calls] == [pytest.approx(4 * 512 * 512 * 4, rel=0.05)] * 2


def test_peak_memory_of_attention_is_that_of_its_map():
    q = torch.randn(2, 4, 64, 8)

    def opened():
        return (q @ q.transpose(-1, -2)).softmax(-1) @ q

    scores, out = 2 * 4 * 64 * 64 * 4, q.nbytes
    assert scores * 2 <= peak_memory(opened) <= scores * 2 + 3 * out
    assert peak_memory(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) < scores * 2


def test_peak_memory_leaves_the_environment_alone(monkeypatch):
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    peak_memory(lambda: None)
    assert "KINETO_LOG_LEVEL" not in os.environ
    monkeypatch.setenv("KINETO_LOG_LEVEL", "5")
    peak_memory(lambda: None)
    assert os.environ["KINETO_LOG_LEVEL"] == "5"


def test_memory_of_other_devices_is_not_measured():
    with pytest.raises(ValueError, match="peak memory is measured on cpu and cuda, found device meta"):
        peak_memory(lambda: None, "meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_cuda():
    def run():
        first = torch.zeros(2**20, dtype=torch.uint8, device="cuda")
        second = torch.cat([first, first])
        del first
        return second

    assert peak_memory(run, "cuda") == 3 * 2**20
