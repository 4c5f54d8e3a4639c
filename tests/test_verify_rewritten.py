"""The check of a rewritten model against an original that is itself a rewritten model."""

import copy

import pytest
import torch

import fxreuse

from .shared_weights import captured


def verify(original, rewritten, inputs):
    return fxreuse.verify(original, rewritten, inputs, compile=False, latency=False)


def moved(model, *endings):
    """A copy whose parameters of these names are others, as after training."""
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    names = [name for name, _ in twin.named_parameters() if name.endswith(endings)]
    assert names
    with torch.no_grad():
        for name in names:
            twin.get_parameter(name).add_(torch.randn_like(twin.get_parameter(name)), alpha=0.3)
    return twin


@pytest.mark.parametrize(
    ("name", "bias"), [("split", "shared"), ("split", "own"), ("thirds", "shared"), ("interleaved", "own")]
)
def test_residuals_on_a_shared_model_are_compared_with_its_layers_given_weights_of_their_own(name, bias):
    model, _, inputs = captured(name)
    shared = fxreuse.apply(model, f"share k=2 bias={bias}", inputs)
    warm = fxreuse.apply(shared, "residual r=2", inputs)
    parts = tuple(f"{letter}{role}" for letter in "ABD" for role in ("", "_query", "_key", "_value"))
    trained = moved(warm, *parts, "bias")
    check = verify(shared, trained, inputs)
    assert check.outputs.required
    assert check.outputs.against == "the original with shared weights"
    norms = [name for name, _ in trained.named_parameters() if "norm" in name and name.endswith("bias")]
    trained_but_norms = copy.deepcopy(trained)
    for path in norms:
        trained_but_norms.get_parameter(path).data = warm.get_parameter(path).data
    assert verify(shared, trained_but_norms, inputs).passed
    assert not check.passed  # norms take no part: what changed them is a difference
    assert (trained_but_norms(**inputs) - shared(**inputs)).abs().max() > 1e-3


def test_pruning_is_compared_with_priors_and_residuals_of_the_weighed_model():
    model, _, inputs = captured("thirds")
    weighed = fxreuse.apply(model, "fiak | residual k=2 r=2", inputs)
    nothing_cut = fxreuse.prune(weighed, scores=0.0, keys=0.0)
    check = verify(weighed, nothing_cut, inputs)
    assert check.passed
    assert check.outputs.error_float64 < 1e-12
    trained = moved(weighed, "A", "B", "D")
    check = verify(weighed, fxreuse.prune(trained, scores=0.0, keys=0.0), inputs)
    assert check.outputs.error_float64 < 1e-12  # the weights that it works with are taken over
    check = verify(weighed, fxreuse.prune(weighed, scores=0.4, keys=0.0), inputs)
    assert check.passed
    assert check.outputs.error_float64 > 1e-6
    assert check.outputs.notes == ("by design, fiak makes another function: errors are for information",)


def test_sharing_what_is_shared_already_is_said_to_be_another_function():
    model, _, inputs = captured("split")
    shared = fxreuse.apply(model, "share k=2", inputs)
    check = verify(shared, fxreuse.apply(shared, "share k=4", inputs), inputs)
    assert not check.outputs.required
    assert check.outputs.notes == ("by design, share makes another function: errors are for information",)


def test_what_a_shared_fused_weight_makes_of_followers_is_said_not_to_be_checked():
    model, _, inputs = captured("thirds")
    shared = fxreuse.apply(model, "share k=2", inputs)
    check = verify(shared, fxreuse.apply(shared, "2x2 | residual r=2", inputs), inputs)
    assert not check.outputs.required
    assert check.outputs.error_float64 < 1e-12  # residuals start at nothing
    assert check.outputs.notes == ("by design, residual makes another function: errors are for information",)
