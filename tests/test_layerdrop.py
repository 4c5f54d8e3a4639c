"""LayerDrop: a rewritten model drops the layers that the original drops, except those whose map others need."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import fxreuse

from .captures import captured
from .running import assert_same, assert_same_gradients, call, named_tensors, seeded_step

SEEDS = range(12)


def inputs() -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(2, 230)}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return captured("hubert_layerdrop").model


@pytest.fixture(scope="module")
def identity() -> nn.Module:
    return captured("hubert_layerdrop").apply("1x*")


@pytest.fixture(scope="module")
def shared() -> nn.Module:
    return captured("hubert_layerdrop").apply("2x* lowering=materialize")


def runs(small: nn.Module, training: bool) -> Counter[int]:
    """How often each layer computes something in as many calls as there are seeds, by its feed-forward."""
    counted: Counter[int] = Counter()
    small = copy.deepcopy(small).train(training)
    for index, layer in enumerate(small.encoder.layers):
        layer.feed_forward.intermediate_dense.register_forward_hook(lambda *_, index=index: counted.update([index]))
    for seed in SEEDS:
        torch.manual_seed(seed)
        call(small, inputs())
    return counted


def layerdrop_notes(small: nn.Module) -> list[str]:
    return [str(note) for note in fxreuse.describe(small).notes if note.kind == "layerdrop"]


def test_the_identity_trains_bit_by_bit(model: nn.Module, identity: nn.Module) -> None:
    model, small, given = copy.deepcopy(model), copy.deepcopy(identity), inputs()
    outputs = set()
    for seed in SEEDS:
        expected, expected_gradients = seeded_step(model, lambda: call(model, given), seed)
        found, found_gradients = seeded_step(small, lambda: call(small, given), seed)
        assert_same(found, expected)
        dropped = {name for name, gradient in expected_gradients.items() if gradient is None}
        assert {name for name, gradient in found_gradients.items() if gradient is None} == dropped
        assert_same_gradients(found_gradients, expected_gradients)
        outputs.add(frozenset(name.split(".")[2] for name in dropped if name.startswith("encoder.layers.")))
    assert len(outputs) > 3  # other seeds drop other layers


def test_nothing_is_lost_or_spared_by_the_identity(identity: nn.Module) -> None:
    assert layerdrop_notes(identity) == []
    assert [note for note in fxreuse.describe(identity).notes if note.kind == "training"] == []
    counted = runs(identity, training=True)
    assert all(0 < counted[index] < len(SEEDS) for index in range(4)), counted


def test_leaders_are_never_dropped_and_followers_are(shared: nn.Module) -> None:
    counted = runs(shared, training=True)
    assert [counted[index] for index in (0, 2)] == [len(SEEDS)] * 2
    assert all(0 < counted[index] < len(SEEDS) for index in (1, 3)), counted


def test_layers_that_nobody_follows_are_dropped() -> None:
    """Queries and keys are shared here, which is no different from a map."""
    small = captured("hubert_layerdrop").apply("1+2+1 lowering=recompute")
    counted = runs(small, training=True)
    assert counted[1] == len(SEEDS)
    assert all(0 < counted[index] < len(SEEDS) for index in (0, 2, 3)), counted


@pytest.mark.parametrize("which", ["identity", "shared"])
def test_nothing_is_dropped_in_evaluation(which: str, request: pytest.FixtureRequest) -> None:
    small = request.getfixturevalue(which)
    assert runs(small, training=False) == dict.fromkeys(range(4), len(SEEDS))
    given = inputs()
    first, second = (named_tensors(call(small.eval(), given)) for _ in range(2))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_the_record_says_which_layers_are_spared(shared: nn.Module) -> None:
    (note,) = layerdrop_notes(shared)
    assert "encoder.layers.0" in note
    assert "2 layers" in note
    assert note in str(fxreuse.describe(shared))
