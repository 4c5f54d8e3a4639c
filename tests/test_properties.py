"""Properties over random Transformers and random plans, against the definition that the models carry themselves."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fxreuse

from .architectures import randomise
from .running import assert_same, assert_same_gradients, call, cast, changes, gradients, seeded_step, snapshot
from .strategies import Spec, Transformer, plans, specs

# One example is a capture and takes about a second.
FEW = settings(max_examples=max(5, settings.default.max_examples // 2))

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
def requests(draw: st.DrawFn) -> Request:
    spec = draw(specs())
    return Request(spec, *draw(plans(spec.layers)), draw(other_sizes))


@settings(FEW)
@given(specs(), other_sizes)
def test_the_identity_plan_changes_nothing(spec: Spec, sizes: tuple[int, int, int]) -> None:
    request = Request(spec, "1x*", tuple(range(spec.layers)), sizes)
    model, captured, other = request.build(), request.inputs(CAPTURED), request.inputs(sizes)
    rewritten = fxreuse.apply(model, request.plan, captured)
    for inputs in (captured, other):
        assert_same(call(rewritten, inputs), call(model, inputs), 1e-12)
    parameters = dict(model.named_parameters())
    assert {name: id(p) for name, p in rewritten.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    expected, expected_gradients = seeded_step(model, lambda: call(model, other))
    actual, actual_gradients = seeded_step(rewritten, lambda: call(rewritten, other))
    assert_same(actual, expected, 1e-12)
    assert_same_gradients(actual_gradients, expected_gradients, 1e-12)


@given(requests(), lowerings)
def test_reuse_is_what_the_definition_says(request: Request, lowering: str) -> None:
    assume(not request.mixes_masks)
    model, captured, other = request.build(), request.inputs(CAPTURED), request.inputs(request.sizes)
    rewritten = fxreuse.apply(model, f"{request.plan} lowering={lowering}", captured)
    for inputs in (captured, other):
        assert_same(call(rewritten, inputs), model.run(request.leaders, **inputs), TOLERANCE)
    expected, expected_gradients = seeded_step(model, lambda: model.run(request.leaders, **other))
    actual, actual_gradients = seeded_step(rewritten, lambda: call(rewritten, other))
    assert_same(actual, expected, TOLERANCE)
    assert_same_gradients(actual_gradients, expected_gradients, TOLERANCE)


@settings(FEW)
@given(requests(), lowerings)
def test_the_record_says_which_parameters_are_gone(request: Request, lowering: str) -> None:
    assume(not request.mixes_masks)
    model, captured = request.build(), request.inputs(CAPTURED)
    rewritten = fxreuse.apply(model, f"{request.plan} lowering={lowering}", captured)
    unused = {n for n, g in gradients(model, model.run(request.leaders, **captured)).items() if g is None}
    originals, remaining = dict(model.named_parameters()), dict(rewritten.named_parameters())
    assert originals.keys() - remaining.keys() == unused
    record = fxreuse.describe(rewritten)
    assert unused <= record.removed.keys()
    for name, parameter in originals.items():
        left = remaining[name].numel() if name in remaining else 0
        assert parameter.numel() - record.removed.get(name, 0) + record.added.get(name, 0) == left, name
    followers = sum(leader != i for i, leader in enumerate(request.leaders))
    assert (record.parameters_removed > record.parameters_added) == (followers > 0)


@settings(FEW)
@given(requests(), lowerings, st.booleans())
def test_applying_leaves_the_model_alone(request: Request, lowering: str, training: bool) -> None:
    model, captured = request.build().train(training), request.inputs(CAPTURED)
    outputs = call(copy.deepcopy(model).eval(), captured)
    before = snapshot(model)
    try:
        rewritten = fxreuse.apply(model, f"{request.plan} lowering={lowering}", captured)
    except fxreuse.FxReuseError:
        assert request.mixes_masks
    else:
        assert not request.mixes_masks
        assert rewritten.training == training
        call(rewritten.eval(), captured)
    after = snapshot(model)
    assert {kind: changes(before[kind], after[kind]) for kind in before} == {kind: [] for kind in before}
    assert torch.equal(call(model.eval(), captured), outputs)


@settings(FEW)
@given(requests())
def test_layers_with_different_masks_do_not_share_a_map(request: Request) -> None:
    spec = dataclasses.replace(request.spec, mask="alternating", padding="none", cross=False)
    request = dataclasses.replace(request, spec=spec)
    assume(request.mixes_masks)
    model = request.build()
    with pytest.raises(fxreuse.FxReuseError, match="mask") as caught:
        fxreuse.apply(model, request.plan, request.inputs(CAPTURED))
    pairs = [
        (f"layers.{i}.attention", f"layers.{leader}.attention")
        for i, leader in enumerate(request.leaders)
        if spec.windowed(i) != spec.windowed(leader)
    ]
    assert any(follower in str(caught.value) and leader in str(caught.value) for follower, leader in pairs)


@settings(max_examples=200)
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
