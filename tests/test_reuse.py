"""Reuse on public architectures: equal to the original run eagerly with shared maps, and smaller as the record says."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch

import fxreuse
from fxreuse.checking.reference import MapSharing, site_calls, site_name
from fxreuse.record import Record

from .architectures import ARCHITECTURES, Case
from .captures import captured
from .running import (
    Gradients,
    assert_same,
    assert_same_gradients,
    call,
    call_original,
    cast,
    changes,
    count_maps,
    gradients,
    named_tensors,
    seeded_step,
    snapshot,
)

LOWERINGS = ("materialize", "recompute")

# In eval mode these are as their unmasked variant.
NAMES = sorted(ARCHITECTURES.keys() - {"hubert_dense", "hubert_layerdrop"})

TOLERANCE = 1e-10


@dataclasses.dataclass
class Reused:
    """A model and what a plan makes of it; ``double`` has both in float64, without what a model keeps of its calls."""

    case: Case
    name: str
    lowering: str
    rewritten: torch.nn.Module
    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]

    @property
    def model(self) -> torch.nn.Module:
        return self.case.model

    @property
    def record(self) -> Record:
        return fxreuse.describe(self.rewritten)

    @functools.cached_property
    def double(self) -> Double:
        return Double(in_double(self.name), copy.deepcopy(self.rewritten).double())


@dataclasses.dataclass
class Double:
    case: Case
    rewritten: torch.nn.Module

    @property
    def model(self) -> torch.nn.Module:
        return self.case.model

    def sharing(self, model: torch.nn.Module | None = None) -> MapSharing:
        return MapSharing(self.model if model is None else model, self.case.followers())

    @functools.cached_property
    def reference_gradients(self) -> Gradients:
        with self.sharing():
            return gradients(self.model, call_original(self.model, self.case.inputs))

    @functools.cached_property
    def unused(self) -> set[str]:
        """The parameters that the model does not use for these inputs, plan or no plan."""
        return without_gradient(gradients(self.model, call_original(self.model, self.case.inputs)))


def without_gradient(found: Gradients) -> set[str]:
    """What no output depends on; a gradient that is zero up to rounding, as that of a key bias, is another thing."""
    return {name for name, gradient in found.items() if gradient is None or not gradient.any()}


def in_double(name: str) -> Case:
    case = ARCHITECTURES[name]()
    return dataclasses.replace(
        case,
        model=case.model.double(),
        inputs=cast(case.inputs, torch.float64),
        other_inputs=cast(case.other_inputs, torch.float64),
    )


@pytest.fixture(
    scope="module",
    params=[(name, lowering) for name in NAMES for lowering in LOWERINGS],
    ids=lambda param: "-".join(param),
)
def reused(request: pytest.FixtureRequest) -> Reused:
    name, lowering = request.param
    found = captured(name)
    before = snapshot(found.model)
    rewritten = found.apply(found.case.full_plan(f"lowering={lowering}"))
    return Reused(found.case, name, lowering, rewritten, before, snapshot(found.model))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_sharing_a_map_makes_a_difference(name: str) -> None:
    """What the other tests of this file rest on."""
    case = in_double(name)
    sites = site_calls(case.model, case.inputs)
    assert [(case.site.format(i), 0) for i in range(case.layers)] == [s for s in sites if matches(case.site, s[0])]
    own = named_tensors(call_original(case.model, case.inputs))
    with MapSharing(case.model, case.followers()):
        shared = named_tensors(call_original(case.model, case.inputs))
    change = max(float((own[place] - shared[place]).detach().abs().max()) for place in own)
    assert change > 1e-2
    assert all(torch.isfinite(tensor).all() for tensor in own.values())


def matches(template: str, path: str) -> bool:
    head, tail = template.split("{}")
    return path.startswith(head) and path.endswith(tail) and path[len(head) : len(path) - len(tail)].isdigit()


@pytest.mark.parametrize("which", ["inputs", "other_inputs"])
def test_equals_the_reference(reused: Reused, which: str) -> None:
    double = reused.double
    inputs = getattr(double.case, which)
    with double.sharing():
        expected = call_original(double.model, inputs)
    assert_same(call(double.rewritten, inputs), expected, TOLERANCE)


def test_has_the_gradients_of_the_reference(reused: Reused) -> None:
    double = reused.double
    actual = gradients(double.rewritten, call(double.rewritten, double.case.inputs))
    assert_same_gradients(actual, double.reference_gradients, TOLERANCE)


def test_trains_as_the_reference(reused: Reused) -> None:
    """Every consumer of a map has its own dropout, at the place in the random stream where it had it before."""
    if reused.case.training_lost:
        pytest.skip("the record says what training loses")
    double = reused.double
    model, rewritten, inputs = copy.deepcopy(double.model), copy.deepcopy(double.rewritten), double.case.inputs
    with double.sharing(model):
        expected, expected_gradients = seeded_step(model, lambda: call_original(model, inputs))
    actual, actual_gradients = seeded_step(rewritten, lambda: call(rewritten, inputs))
    assert_same(actual, expected, TOLERANCE)
    assert_same_gradients(actual_gradients, expected_gradients, TOLERANCE)


def test_removes_what_the_reference_does_not_use(reused: Reused) -> None:
    """A parameter that gets no gradient because maps are shared is gone; the record names it and its size."""
    originals = dict(reused.model.named_parameters())
    remaining = dict(reused.rewritten.named_parameters())
    double = reused.double
    unused = without_gradient(double.reference_gradients) - double.unused
    assert remaining.keys() == originals.keys() - unused
    assert not unused & reused.rewritten.state_dict().keys()
    removed, added = reused.record.removed, reused.record.added
    assert unused <= removed.keys()
    for name, parameter in originals.items():
        left = remaining[name].numel() if name in remaining else 0
        assert parameter.numel() - removed.get(name, 0) + added.get(name, 0) == left, name
    total = sum(p.numel() for p in originals.values()) - sum(p.numel() for p in remaining.values())
    assert total > 0
    assert reused.record.parameters_removed - reused.record.parameters_added == total
    assert not [note for note in reused.record.notes if note.kind == "cost"]


def test_shares_the_parameters_that_it_keeps(reused: Reused) -> None:
    originals = dict(reused.model.named_parameters())
    for name, parameter in reused.rewritten.named_parameters():
        assert parameter is originals[name] or parameter.shape != originals[name].shape, name


def test_every_remaining_parameter_learns(reused: Reused) -> None:
    """Those aside that do not get a gradient in the reference either, or one that is zero up to rounding."""
    double = reused.double
    rewritten = copy.deepcopy(double.rewritten).train()
    reference = double.reference_gradients
    used = {name for name, value in reference.items() if value is not None and float(value.abs().max()) > 1e-9}
    remaining = dict(rewritten.named_parameters())
    assert len(used & remaining.keys()) > len(remaining) // 2
    before = {name: parameter.detach().clone() for name, parameter in remaining.items()}
    optimizer = torch.optim.SGD(rewritten.parameters(), lr=0.1)
    for _ in range(3):  # a layer may be dropped in one of them
        found = gradients(rewritten, call(rewritten, double.case.inputs))
        for name, parameter in remaining.items():
            parameter.grad = found[name]
        optimizer.step()
    assert [name for name in sorted(used & remaining.keys()) if torch.equal(remaining[name], before[name])] == []


def test_computes_a_map_for_each_group(reused: Reused) -> None:
    sites = len(site_calls(reused.model, reused.case.inputs))
    followers = len(reused.case.followers())
    expected = sites - followers if reused.lowering == "materialize" else sites
    assert count_maps(reused.rewritten) == expected


def test_records_a_decision_for_every_site(reused: Reused) -> None:
    case = reused.case
    decisions = {decision.site: decision for decision in reused.record.decisions}
    assert len(decisions) == len(reused.record.decisions)
    for layer, leader in enumerate(case.leaders):
        decision = decisions.pop(case.site.format(layer))
        alone = case.leaders.count(layer) == 1
        assert decision.layer == layer
        assert decision.action == ("follow" if leader != layer else "keep" if alone else "lead")
        assert decision.leader == (case.site.format(leader) if leader != layer else None)
        if leader != layer:
            assert decision.lowering == reused.lowering
            assert any(name.startswith(case.layer.format(layer)) for name in decision.removed), decision
    others = {site_name(site) for site in site_calls(reused.model, case.inputs)}
    assert decisions.keys() <= others
    assert {decision.action for decision in decisions.values()} <= {"keep", "skip"}
    assert {name for decision in reused.record.decisions for name in decision.removed} == set(reused.record.removed)


def test_every_layer_is_a_module_with_code(reused: Reused) -> None:
    """In the layer of a follower whose map is kept there is no softmax any more, in any other one there is."""
    sites = [path for path, _ in site_calls(reused.model, reused.case.inputs)]
    for layer, leader in enumerate(reused.case.leaders):
        path = reused.case.layer.format(layer)
        outlined = reused.rewritten.get_submodule(path)
        assert "def forward(" in outlined.code
        gone = leader != layer and reused.lowering == "materialize"
        assert count_maps(outlined) == sum(site.startswith(f"{path}.") for site in sites) - gone


def test_leaves_the_model_untouched(reused: Reused) -> None:
    assert {what: changes(before, reused.after[what]) for what, before in reused.before.items()} == {
        what: [] for what in reused.before
    }


def test_a_layer_whose_map_others_use_is_never_dropped() -> None:
    case = captured("hubert_layerdrop").case
    rewritten = captured("hubert_layerdrop").apply(case.full_plan())
    dropped = dict.fromkeys(range(case.layers), 0)
    for seed in range(12):
        _, found = seeded_step(rewritten, lambda: call(rewritten, case.inputs), seed)
        for layer in dropped:
            own = {name: found[name] for name in found if name.startswith(f"{case.layer.format(layer)}.")}
            assert own
            dropped[layer] += all(gradient is None for gradient in own.values())
    assert [layer for layer, times in dropped.items() if times] == [i for i, j in enumerate(case.leaders) if i != j]
