"""Properties over random Transformers and random plans, against the definition that the models carry themselves."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

import fxreuse
from fxreuse.frontend.load import load_program
from fxreuse.program import Program
from fxreuse.record import Record

from .architectures import randomise
from .running import apply_captured, assert_same, assert_same_gradients, call, cast, changes, seeded_step, snapshot
from .strategies import Spec, Transformer, plans, specs

CAPTURED = (2, 5, 7)
TOLERANCE = 1e-10

other_sizes = st.tuples(st.integers(1, 4), st.integers(2, 10), st.integers(2, 10))
lowerings = st.sampled_from(["materialize", "recompute", "auto"])


@dataclasses.dataclass(frozen=True)
class Request:
    """A model, a plan for it as text and as leaders, and sizes to try it at."""

    spec: Spec
    plan: str
    leaders: tuple[int, ...]
    sizes: tuple[int, int, int]

    def build(self) -> Transformer:
        torch.manual_seed(0)
        model = Transformer(self.spec).double()
        randomise(model)
        return model

    def inputs(self, sizes: tuple[int, int, int]) -> dict[str, torch.Tensor]:
        return cast(self.spec.inputs(*sizes), torch.float64)

    @property
    def mixes_masks(self) -> bool:
        return any(self.spec.windowed(i) != self.spec.windowed(leader) for i, leader in enumerate(self.leaders))


@st.composite
def requests(draw: st.DrawFn, models: st.SearchStrategy[Spec]) -> Request:
    spec = draw(models)
    return Request(spec, *draw(plans(spec.layers)), draw(other_sizes))


def apply(model: Transformer, program: Program, request: Request, lowering: str) -> torch.nn.Module:
    """The rewritten model. Scores in the open may be more than what is seen to be affine; fused or bare ones not."""
    try:
        return apply_captured(model, program, f"{request.plan} lowering={lowering}")
    except fxreuse.UnsupportedError as error:
        spec = request.spec
        bare = spec.score == "softmax" and spec.mask == spec.padding == "none" and not spec.relative
        if lowering != "recompute" or spec.score == "sdpa" or bare or "lowering=materialize" not in str(error):
            raise
    reject()


@given(requests(specs()), lowerings, st.booleans())
def test_rewritten_models_are_what_the_definition_says(request: Request, lowering: str, training: bool) -> None:
    """Of one capture: the identity plan changes nothing, and a plan is its definition; the model is left alone."""
    assume(not request.mixes_masks)
    model, captured = request.build().train(training), request.inputs(CAPTURED)
    before = snapshot(model)
    program = load_program(model, captured)
    rewritten = apply(model, program, request, lowering)
    identity = apply_captured(model, program, "1x*")
    after = snapshot(model)
    assert {kind: changes(before[kind], after[kind]) for kind in before} == {kind: [] for kind in before}
    assert rewritten.training == identity.training == training
    assert_identity(identity, model, request)
    assert_reuse(rewritten, model, request)


def assert_identity(rewritten: torch.nn.Module, model: Transformer, request: Request) -> None:
    """Equal outputs in both modes, equal gradients, the same parameters."""
    other = request.inputs(request.sizes)
    model.eval()
    rewritten.eval()
    for inputs in (request.inputs(CAPTURED), other):
        assert_same(call(rewritten, inputs), call(model, inputs), 1e-12)
    expected, expected_gradients = seeded_step(model, lambda: call(model, other))
    actual, actual_gradients = seeded_step(rewritten, lambda: call(rewritten, other))
    assert_same(actual, expected, 1e-12)
    assert_same_gradients(actual_gradients, expected_gradients, 1e-12)
    assert {n: id(p) for n, p in rewritten.named_parameters()} == {n: id(p) for n, p in model.named_parameters()}


def assert_reuse(rewritten: torch.nn.Module, model: Transformer, request: Request) -> None:
    """Equal outputs in both modes, equal gradients, a true record."""
    other = request.inputs(request.sizes)
    model.eval()
    rewritten.eval()
    for inputs in (request.inputs(CAPTURED), other):
        assert_same(call(rewritten, inputs), model.run(request.leaders, **inputs), TOLERANCE)
    expected, expected_gradients = seeded_step(model, lambda: model.run(request.leaders, **other))
    actual, actual_gradients = seeded_step(rewritten, lambda: call(rewritten, other))
    assert_same(actual, expected, TOLERANCE)
    assert_same_gradients(actual_gradients, expected_gradients, TOLERANCE)
    unused = {name for name, gradient in expected_gradients.items() if gradient is None}
    assert_record_is_true(fxreuse.describe(rewritten), model, rewritten, unused)
    followers = sum(leader != i for i, leader in enumerate(request.leaders))
    assert sum(d.action == "follow" for d in fxreuse.describe(rewritten).decisions) == followers


def assert_record_is_true(record: Record, model: torch.nn.Module, rewritten: torch.nn.Module, unused: set[str]) -> None:
    """What is gone is what nothing reads any more, and the record has its size."""
    originals, remaining = dict(model.named_parameters()), dict(rewritten.named_parameters())
    assert originals.keys() - remaining.keys() == unused
    for name, parameter in originals.items():
        left = remaining[name].numel() if name in remaining else 0
        assert parameter.numel() - record.removed.get(name, 0) + record.added.get(name, 0) == left, name


# What decides how a mask gets into the scores. So few models that most plans find theirs captured.
alternating = st.builds(
    Spec,
    layers=st.sampled_from([3, 2, 4]),
    score=st.sampled_from(["sdpa", "softmax", "bmm"]),
    relative=st.booleans(),
    mask=st.just("alternating"),
)


@functools.cache
def captured_once(spec: Spec) -> tuple[Transformer, Program]:
    request = Request(spec, "", (), CAPTURED)
    model = request.build()
    return model, load_program(model, request.inputs(CAPTURED))


@given(requests(alternating))
def test_layers_with_different_masks_do_not_share_a_map(request: Request) -> None:
    assume(request.mixes_masks)
    with pytest.raises(fxreuse.FxReuseError, match="mask") as caught:
        apply_captured(*captured_once(request.spec), request.plan)
    windowed = request.spec.windowed
    pairs = [
        (f"layers.{i}.attention", f"layers.{leader}.attention")
        for i, leader in enumerate(request.leaders)
        if windowed(i) != windowed(leader)
    ]
    assert any(follower in str(caught.value) and leader in str(caught.value) for follower, leader in pairs)


@settings(max_examples=max(200, settings.default.max_examples))
@given(st.integers(1, 12).flatmap(plans), st.sampled_from(["", "encoder", "a.b.{i}·self"]), lowerings)
def test_plans_print_as_they_are_read(plan: tuple[str, tuple[int, ...]], stack: str, lowering: str) -> None:
    text, leaders = plan
    options = [f"stack={stack}"] if stack else []
    parsed = fxreuse.Plan.parse(" ".join([text, *options, f"lowering={lowering}"]))
    assert fxreuse.Plan.parse(str(parsed)) == parsed
    (step,) = parsed.passes
    assert (step.stack, step.lowering) == (stack or None, lowering)
    if not text.endswith("*") or len(leaders) >= 2:
        assert step.groups.leaders(len(leaders)) == leaders
