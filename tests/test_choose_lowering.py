"""``lowering=auto``: what is chosen, why, and what happens where the choice is refused."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import types
from collections.abc import Sequence

import pytest
import torch

import fxreuse
from fxreuse.attention import AttentionSite
from fxreuse.cost_model.attention_time import SharedMap
from fxreuse.cost_model.device import Rate
from fxreuse.cost_model.presets import SERVER_CPU
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program
from fxreuse.program import Program

from .test_lowerings import Attend, Model, capped, divided, fused, inputs, unfused

choosing = importlib.import_module("fxreuse.passes.choose_lowering")
reusing = importlib.import_module("fxreuse.passes.reuse")

ATTENTIONS: dict[str, Attend] = {
    "fused": fused(),
    "unfused": unfused(divided),
    "causal": fused(is_causal=True),
    "soft cap": unfused(capped),
}


@pytest.fixture(autouse=True)
def not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine of which nothing is known."""
    monkeypatch.setattr(choosing.Device, "typical_cpu", lambda: SERVER_CPU)


@functools.cache
def program(kind: str) -> Program:
    """Of heads as wide as they usually are: of narrow ones, computing a map again is cheaper than reading it."""
    return load_program(Model(ATTENTIONS[kind], value_width=64, width=64), inputs(None))


def choose(kind: str, leaders: Sequence[int] = (0, 0, 2, 2)) -> tuple[str, str]:
    given = program(kind)
    return choosing.choose_lowering(given, find(given), leaders)


@pytest.mark.parametrize("kind", ["fused", "unfused", "soft cap"])
def test_on_a_cpu_the_map_is_stored(kind: str) -> None:
    lowering, reason = choose(kind)
    assert lowering == "materialize"
    assert [text for text in ("on a CPU", "predicted", "2.3 KiB", "(3×4×5×5)") if text not in reason] == []


def test_a_long_causal_map_is_cheaper_to_compute_again_in_part() -> None:
    lowering, reason = choose("causal")
    assert lowering == "recompute"
    assert "computing it again takes up to 1." in reason
    assert "at 4096" in reason


def test_the_reason_says_what_was_predicted_for_which_device() -> None:
    reason = choose("fused")[1]
    assert f"predicted for {SERVER_CPU.name}" in reason
    assert reason.count(" ms against ") == 6


@pytest.mark.parametrize("factor", [0.1, 10])
def test_it_is_the_predicted_times_that_decide(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """On a device whose fused attention is much faster, or slower, the choice is another one."""
    products = dict(SERVER_CPU.products)
    products["attention"] = Rate(products["attention"].macs * factor)
    other = dataclasses.replace(SERVER_CPU, products=products, score=SERVER_CPU.score / factor)
    monkeypatch.setattr(choosing.Device, "typical_cpu", lambda: other)
    wanted = "recompute" if factor > 1 else "materialize"
    assert [choose(kind)[0] for kind in ("fused", "unfused", "causal")] == [wanted] * 3


def test_the_size_of_the_groups_counts() -> None:
    """What the leader pays to store its map is shared by its followers."""
    shared = {layers: SharedMap(4, 512, 512, 64, 64, layers) for layers in (2, 4)}
    stored, again = (
        [way(SERVER_CPU) for way in ways]
        for ways in zip(*((one.stored, one.computed_again) for one in shared.values()), strict=True)
    )
    assert again[1] == pytest.approx(2 * again[0])
    assert stored[1] < 1.8 * stored[0]


def test_only_groups_that_share_a_map_count() -> None:
    assert choose("fused", (0, 1, 2, 2))[1].count("ms against") == 6
    alone, pair = (choose("fused", leaders)[1] for leaders in ((0, 1, 2, 2), (0, 0, 2, 2)))
    assert alone != pair


def test_the_choice_changes_nothing() -> None:
    given = program("unfused")
    before = given.module.code, [node.name for node in given.graph.nodes]
    choose("unfused")
    assert (given.module.code, [node.name for node in given.graph.nodes]) == before


def test_a_map_that_takes_much_of_the_memory_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 3 * 4 * 5 * 5 * 8
    for memory, expected in [(4 * size, "materialize"), (4 * size - 4, "recompute")]:
        monkeypatch.setattr(choosing, "_memory", lambda device, memory=memory: memory)
        lowering, reason = choose("fused")
        assert lowering == expected
        assert ("memory" in reason or "quarter" in reason) == (expected == "recompute")


def lowered(kind: str, leaders: Sequence[int] = (0, 0, 2, 2)) -> set[tuple[str | None, str]]:
    """The lowerings of a stack with the reasons for them, as in the record."""
    given = program(kind)
    return {(made.lowering, made.reason) for made in reusing.reuse(given, find(given), leaders).decisions}


def test_where_the_choice_is_refused_it_is_the_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_memory", lambda device: 8)
    ((lowering, reason),) = lowered("soft cap")
    assert lowering == "materialize"
    assert "quarter" in reason
    assert "recompute is refused here: layers.0" in reason
    assert "tanh" in reason


class Refusing:
    """A lowering that cannot express anything."""

    def __init__(self, program: Program, dtype: torch.dtype | None = None) -> None: ...

    def share(self, leader: AttentionSite, followers: Sequence[AttentionSite]) -> None:
        raise fxreuse.UnsupportedError("not here")


def test_it_is_tried_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reusing, "Materializer", Refusing)
    ((lowering, reason),) = lowered("fused")
    assert (lowering, reason.endswith("materialize is refused here: not here")) == ("recompute", True)


def test_where_both_are_refused_it_says_why_the_choice_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reusing, "Materializer", Refusing)
    with pytest.raises(fxreuse.UnsupportedError, match="not here"):
        lowered("soft cap")


def test_on_an_accelerator_fused_attention_stays_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = types.SimpleNamespace(device=torch.device("cuda:0"))
    monkeypatch.setattr(choosing, "reads", lambda program: {"weight": weight})
    monkeypatch.setattr(choosing, "_memory", lambda device: 2**40)
    assert choose("fused")[0] == "recompute"
    assert "cuda" in choose("fused")[1]
    assert choose("unfused")[0] == "materialize"
    assert "unfused" in choose("unfused")[1]
