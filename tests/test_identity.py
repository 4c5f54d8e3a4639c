"""The identity plan: whatever a model does, the rewritten one does, in every mode, dtype and size."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from typing import Any

import pytest
import torch

import fxreuse
from fxreuse.checking.reference import site_calls

from .architectures import ARCHITECTURES, SAME_MODEL, Case, randomise
from .captures import Captured, captured, mixed_modes
from .running import (
    assert_same,
    assert_same_gradients,
    call,
    call_original,
    cast,
    changes,
    count_maps,
    named_tensors,
    seeded_step,
    snapshot,
)
from .strategies import Spec, Transformer

NAMES = sorted(ARCHITECTURES.keys() - SAME_MODEL.keys())


@dataclasses.dataclass
class Identity:
    """An architecture, captured and rewritten in mixed modes, and all that there was to see around both."""

    captured: Captured
    rewritten: torch.nn.Module
    before: dict[str, Any]
    after: dict[str, Any]
    modes: dict[str, bool]
    warned: list[str]

    @property
    def case(self) -> Case:
        return self.captured.case

    @property
    def model(self) -> torch.nn.Module:
        return self.case.model

    @property
    def tolerance(self) -> float:
        return 1e-12 if self.case.inexact else 0.0

    def copies(self, *, exact: bool = True) -> tuple[torch.nn.Module, torch.nn.Module]:
        """Model and rewritten model, each with parameters of its own; in float64 unless bits can be compared."""
        pair = copy.deepcopy(self.model), copy.deepcopy(self.rewritten)
        return pair if exact and not self.case.inexact else (pair[0].double(), pair[1].double())

    def given(self, which: str) -> Any:
        inputs = getattr(self.case, which)
        return cast(inputs, torch.float64) if self.case.inexact else inputs


@pytest.fixture(scope="module", params=NAMES)
def identity(request: pytest.FixtureRequest) -> Identity:
    found = captured(request.param)
    case = found.case
    mixed_modes(case)
    before = snapshot(case.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rewritten = found.apply("1x*" + ("" if case.stack is None else f" stack={case.stack}"))
    after = snapshot(case.model)
    modes = {name: part.training for name, part in rewritten.named_modules()}
    case.model.eval()
    rewritten.eval()
    return Identity(found, rewritten, before, after, modes, [str(warning.message) for warning in caught])


@pytest.mark.parametrize("which", ["inputs", "other_inputs"])
def test_gives_the_same_outputs(identity: Identity, which: str) -> None:
    model, rewritten = identity.copies()
    inputs = identity.given(which)
    assert_same(call(rewritten, inputs), call_original(model, inputs), identity.tolerance)


def test_is_called_by_position_too(identity: Identity) -> None:
    inputs = identity.case.inputs
    if isinstance(inputs, tuple):
        first, *rest = inspect.signature(identity.model.forward).parameters
        assert len(inputs) == 1
        actual = identity.rewritten(**{first: inputs[0]})
    else:
        names = list(inspect.signature(identity.model.forward).parameters)
        count = next((i for i, name in enumerate(names) if name not in inputs), len(names))
        assert count >= 1
        rest = {name: inputs[name] for name in names[count:] if name in inputs}
        actual = identity.rewritten(*(inputs[name] for name in names[:count]), **rest)
    assert_same(actual, call(identity.rewritten, inputs))


def test_shares_the_parameters(identity: Identity) -> None:
    ours, theirs = identity.rewritten, identity.model
    assert set(ours.state_dict()) == set(theirs.state_dict())
    parameters = dict(theirs.named_parameters(remove_duplicate=False))
    found = dict(ours.named_parameters(remove_duplicate=False))
    assert found.keys() == parameters.keys()
    assert [name for name, parameter in parameters.items() if found[name] is not parameter] == []
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize(
    "what",
    ["mode", "attributes", "hooks", "identity", "gradients", "trainable", "values", "use_cache", "random", "globals"],
)
def test_leaves_the_model_untouched(identity: Identity, what: str) -> None:
    assert changes(identity.captured.before[what], identity.captured.after[what]) == []
    assert changes(identity.before[what], identity.after[what]) == []


def test_is_in_the_mode_of_the_model(identity: Identity) -> None:
    modes = identity.before["mode"]
    common = modes.keys() & identity.modes.keys()
    assert identity.case.layer.format(1) in common
    assert {name: identity.modes[name] for name in common} == {name: modes[name] for name in common}


def test_keeps_every_attention(identity: Identity) -> None:
    record = fxreuse.describe(identity.rewritten)
    assert {decision.action for decision in record.decisions} <= {"keep", "skip"}
    assert record.parameters_removed == record.parameters_added == 0
    assert count_maps(identity.rewritten) == len(site_calls(identity.model, identity.case.inputs))


def test_names_what_training_loses(identity: Identity) -> None:
    lost = [note for note in fxreuse.describe(identity.rewritten).notes if note.kind == "training"]
    assert bool(lost) == identity.case.training_lost, [str(note) for note in lost]
    for note in lost:
        assert note.remedy, note
        assert any(note.where in text for text in identity.warned), note


def test_in_double_precision(identity: Identity) -> None:
    model, rewritten = identity.copies(exact=False)
    inputs = cast(identity.case.other_inputs, torch.float64)
    actual = call(rewritten, inputs)
    assert {t.dtype for t in named_tensors(actual).values() if t.is_floating_point()} == {torch.float64}
    assert_same(actual, call_original(model.double(), inputs), 1e-12)


def test_on_the_meta_device(identity: Identity) -> None:
    expected = call_original(copy.deepcopy(identity.model), identity.case.other_inputs)
    rewritten = copy.deepcopy(identity.rewritten).to("meta")
    actual = named_tensors(call(rewritten, cast(identity.case.other_inputs, "meta")))
    assert {tensor.device.type for tensor in actual.values()} == {"meta"}
    shapes = {place: tensor.shape for place, tensor in named_tensors(expected).items()}
    assert {place: tensor.shape for place, tensor in actual.items()} == shapes


def test_under_autocast(identity: Identity) -> None:
    """On a copy, and before any other call of that size: some models keep tables for the next call, in any dtype."""
    model, inputs = copy.deepcopy(identity.model), identity.case.other_inputs
    with torch.autocast("cpu", torch.bfloat16):
        expected = call_original(model, inputs)
        actual = call(identity.rewritten, inputs)
    full = named_tensors(call_original(model, inputs))
    assert_same(actual, expected, 2e-2 if identity.case.inexact else 0.0)
    changed = [place for place, tensor in named_tensors(actual).items() if not torch.equal(tensor.float(), full[place])]
    assert changed, "autocast changed nothing"


def test_trains_bit_by_bit(identity: Identity) -> None:
    if identity.case.training_lost:
        pytest.skip("the record says what training loses; see test_names_what_training_loses")
    model, rewritten = identity.copies()
    inputs = identity.given("inputs")
    expected, expected_gradients = seeded_step(model, lambda: call_original(model, inputs))
    actual, actual_gradients = seeded_step(rewritten, lambda: call(rewritten, inputs))
    assert_same(actual, expected, identity.tolerance)
    assert actual_gradients.keys() == expected_gradients.keys()
    assert_same_gradients(actual_gradients, expected_gradients, identity.tolerance)
    counters = dict(rewritten.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(counters[name], buffer), name


def test_is_random_in_training_mode_only(identity: Identity) -> None:
    rewritten = copy.deepcopy(identity.rewritten)
    inputs = identity.case.inputs

    def first() -> torch.Tensor:
        return next(iter(named_tensors(call(rewritten, inputs)).values()))

    assert torch.equal(first(), first())
    rewritten.train()
    assert not torch.equal(first(), first())
    rewritten.eval()
    assert torch.equal(first(), first())


class Framed(torch.nn.Module):
    """A convolution makes frames of samples, as in speech models, and a Transformer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = torch.nn.Conv1d(1, 8, 10, stride=5)
        self.body = Transformer(Spec(heads=2, head_dim=4))

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        return self.body(self.frames(samples[:, None]).transpose(1, 2))


@pytest.mark.parametrize("layout", ["slice", "transposed"])
def test_example_inputs_lie_in_memory_as_they_like(layout: str) -> None:
    model = randomise(Framed())
    samples = torch.randn(2, 90)[:, :60] if layout == "slice" else torch.randn(60, 2).T
    assert not samples.is_contiguous()
    rewritten = fxreuse.apply(model, "1x*", samples)
    for other in (samples, samples.contiguous(), torch.randn(3, 71)):
        torch.testing.assert_close(rewritten(other), model(other))
