"""``lowering=auto``: what is chosen, why, and what happens where the choice is refused."""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Sequence

import pytest
import torch

import fxreuse
from fxreuse.attention import AttentionSite
from fxreuse.find import find
from fxreuse.frontend import load_program
from fxreuse.program import Program

from .test_lowerings import Attend, Model, capped, divided, fused, inputs, unfused

choosing = importlib.import_module("fxreuse.passes.choose_lowering")

ATTENTIONS: dict[str, Attend] = {
    "fused": fused(),
    "unfused": unfused(divided),
    "causal": fused(is_causal=True),
    "soft cap": unfused(capped),
}


@functools.cache
def program(kind: str) -> Program:
    return load_program(Model(ATTENTIONS[kind]), inputs(None))


def choose(kind: str, leaders: Sequence[int] = (0, 0, 2, 2)) -> tuple[str, str]:
    given = program(kind)
    return choosing.choose_lowering(given, find(given), leaders)


@pytest.mark.parametrize("kind", ["fused", "unfused", "soft cap"])
def test_on_a_cpu_the_map_is_stored_at_every_length(kind: str) -> None:
    lowering, reason = choose(kind)
    assert lowering == "materialize"
    assert [text for text in ("on a CPU", "any length", "2.3 KiB", "(3×4×5×5)") if text not in reason] == []


def test_a_long_causal_map_is_cheaper_to_compute_again_in_part() -> None:
    lowering, reason = choose("causal")
    assert lowering == "recompute"
    assert "causal" in reason


def test_the_size_of_the_groups_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the leader pays to store its map is shared by its followers."""
    monkeypatch.setattr(choosing, "_SOFTMAX", 40)
    assert choose("causal", (0, 0, 2, 2))[0] == "recompute"
    assert choose("causal", (0, 0, 0, 0))[0] == "materialize"
    assert choose("causal", (0, 1, 2, 2))[0] == "recompute"


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


def test_where_the_choice_is_refused_it_is_the_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_memory", lambda device: 8)
    lowering, reason = choose("soft cap")
    assert lowering == "materialize"
    assert "quarter" in reason
    assert "recompute is refused here: layers.0" in reason
    assert "tanh" in reason


def test_where_both_are_refused_the_choice_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass then says why, in its own words."""

    class Refusing:
        def __init__(self, program: Program) -> None: ...

        def share(self, leader: AttentionSite, followers: Sequence[AttentionSite]) -> None:
            raise fxreuse.UnsupportedError("not here")

    monkeypatch.setitem(choosing._LOWERINGS, "materialize", Refusing)
    lowering, reason = choose("fused")
    assert (lowering, reason.endswith("materialize is refused here: not here")) == ("recompute", True)
    assert choose("soft cap")[0] == "materialize"


def test_on_an_accelerator_fused_attention_stays_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = types.SimpleNamespace(device=torch.device("cuda:0"))
    monkeypatch.setattr(choosing, "reads", lambda program: {"weight": weight})
    monkeypatch.setattr(choosing, "_memory", lambda device: 2**40)
    assert choose("fused")[0] == "recompute"
    assert "cuda" in choose("fused")[1]
    assert choose("unfused")[0] == "materialize"
    assert "unfused" in choose("unfused")[1]
