"""Times of nodes and of parts: which they are, and that measuring leaves a model as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import fxreuse
from fxreuse.checking.node_times import node_times
from fxreuse.cost_model.operations import operations
from fxreuse.emission.rewritten import Rewritten
from fxreuse.reports.breakdown import Breakdown, measure_breakdown


@pytest.fixture(scope="module")
def example() -> torch.Tensor:
    return torch.randn(2, 6, 16)


@pytest.fixture(scope="module")
def original() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()


@pytest.fixture(scope="module")
def small(original: nn.Module, example: torch.Tensor) -> Rewritten:
    found = fxreuse.apply(original, "2x2", example)
    assert isinstance(found, Rewritten)
    return found


def test_every_operation_has_a_time(small: Rewritten, example: torch.Tensor) -> None:
    with torch.no_grad():
        times = node_times(small, lambda: small(example), rounds=2)
    keys = {(one.step.path, one.step.node.name) for one in operations(small.program) if one.kind != "call"}
    assert keys <= times.keys()
    assert min(times.values()) > 0


def test_the_model_computes_the_same_while_it_is_timed_and_afterwards(small: Rewritten, example: torch.Tensor) -> None:
    with torch.no_grad():
        expected, found = small(example), []
        node_times(small, lambda: found.append(small(example)), rounds=2)
        assert all(torch.equal(result, expected) for result in (*found, small(example)))
    assert len(found) == 3
    assert "_timed" not in repr(small.__dict__["_run"])


def test_the_model_is_as_it_was_after_an_error(small: Rewritten, example: torch.Tensor) -> None:
    before = [module.__dict__.get("_run") for module in small.modules()]
    with pytest.raises(fxreuse.InputError):
        node_times(small, lambda: small(example[..., :3]))
    assert [module.__dict__.get("_run") for module in small.modules()] == before


def test_followers_and_leaders_are_parts_of_their_own(
    original: nn.Module, small: Rewritten, example: torch.Tensor
) -> None:
    with torch.no_grad():
        found = measure_breakdown(original, small, example, lambda model: model(example), rounds=2)
    assert found.parts == ["attention", "reused attention", "feed-forward", "rest"]
    assert "reused attention" not in found.original
    assert min(found.rewritten[part] for part in found.parts) > 0


def test_a_model_without_shapes_is_refused(original: nn.Module, small: Rewritten, example: torch.Tensor) -> None:
    for other in (original, copy.copy(nn.Linear(2, 2))):
        with pytest.raises(fxreuse.UnsupportedError, match="cannot be broken down into parts"):
            measure_breakdown(original, other, example, lambda model: model(example))


def test_verify_shows_the_parts(original: nn.Module, small: Rewritten, example: torch.Tensor) -> None:
    found = fxreuse.verify(original, small, example, compile=False, latency=False, breakdown=True)
    assert isinstance(found.breakdown, Breakdown)
    assert "reused attention" in str(found)
    assert set(json.loads(found.to_json())["breakdown"]["original"]) == set(found.breakdown.original)
