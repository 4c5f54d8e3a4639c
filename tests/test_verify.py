"""Verification, on a model that is rewritten by hand: right, and wrong in the ways that rewrites are wrong."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxreuse.checking import checks
from fxreuse.checking.measure import Timing
from fxreuse.checking.numerics import KeepFloat64, difference, named_tensors
from fxreuse.checking.verification import OutputCheck, Verification
from fxreuse.checking.verify import verify
from fxreuse.errors import InputError, UnsupportedError
from fxreuse.record import Decision, Record


class Layer(nn.Module):
    """Attention with two heads, after a norm that works in float32 as those of real models do."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.drop = nn.Dropout(0.1)

    def heads(self, projection, x):
        return projection(x).unflatten(-1, (2, 4)).transpose(1, 2)

    def norm(self, x):
        x32 = x.to(torch.float32)
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def forward(self, x):
        normed = self.norm(x)
        q, k, v = (self.heads(projection, normed) for projection in (self.q, self.k, self.v))
        return x + self.drop(self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x, scale=None):
        states = (x,)
        for layer in self.layers:
            states = (*states, layer(states[-1]))
        last = states[-1]
        return {"last": last if scale is None else last * scale, "states": states, "longest": last.argmax(-1)}


def right(probs):
    return probs


WRONG = {
    "heads mixed": lambda probs: probs.flip(1),
    "samples mixed": lambda probs: probs.roll(1, 0),
    "softmax taken twice": lambda probs: probs.softmax(-1),
    "queries and keys exchanged": lambda probs: probs.transpose(-1, -2),
}


class Rewritten(nn.Module):
    """The net with the map of layer 0 in layer 1, on the same parameters; ``change`` spoils the map."""

    def __init__(self, net, change=right, plan="2x1", lowering="materialize"):
        super().__init__()
        self.net, self.change = net, change
        removed = {f"layers.1.{name}": 72 for name in "qk"}
        self.record = Record(
            plan,
            {"layers.{i}": 2},
            (
                Decision("layers.0", "layers.{i}", 0, "lead"),
                Decision("layers.1", "layers.{i}", 1, "follow", "layers.0", lowering),
            ),
            removed=removed,
        )

    def forward(self, x, scale=None):
        first, second = self.net.layers
        normed = first.norm(x)
        q, k = first.heads(first.q, normed), first.heads(first.k, normed)
        probs = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        one = x + first.o((probs @ first.heads(first.v, normed)).transpose(1, 2).flatten(2))
        v = second.heads(second.v, second.norm(one))
        two = one + second.o((self.change(probs) @ v).transpose(1, 2).flatten(2))
        return {"last": two if scale is None else two * scale, "states": (x, one, two), "longest": two.argmax(-1)}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def quick(original, rewritten, inputs, **options):
    return verify(original, rewritten, inputs, **{"compile": False, "latency": False, **options})


def test_a_right_rewrite_passes(net, x):
    found = quick(net, Rewritten(net), x)
    assert found.passed
    assert found.reasons == found.notes == ()
    assert found.outputs.against == "eager sharing, 1 follower"
    assert 0 <= found.outputs.error_float64 < 1e-13
    assert 0 <= found.outputs.error_float32 < 1e-4
    assert found.outputs.tensors == 5
    assert found.outputs.batch_sizes == (2, 1, 3, 5)
    assert (found.model, found.plan, found.device, found.dtype) == ("Net", "2x1", "cpu", "float32")


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_wrong_rewrite_does_not_pass(change, net, x):
    found = quick(net, Rewritten(net, change), x)
    assert not found.passed
    assert found.outputs.error_float64 > 1e-4
    (reason,) = found.reasons
    assert reason.startswith("outputs in float64 differ from eager sharing, 1 follower by ")
    assert str(found).startswith("FAILED  Net, plan 2x1, cpu, float32\n  because: outputs in float64 differ")


def test_an_error_at_one_batch_size_only_is_seen(net, x):
    found = quick(net, Rewritten(net, lambda probs: probs if len(probs) == 2 else probs.flip(1)), x)
    assert not found.passed


def test_a_small_error_is_seen_behind_float32_casts(net, x):
    assert not quick(net, Rewritten(net, lambda probs: probs * (1 + 1e-8)), x).passed
    assert quick(net, Rewritten(net, lambda probs: probs * (1 + 1e-8)), x, tolerance=1e-6).passed


def test_the_original_is_no_rewrite_of_itself_by_sharing(net, x):
    class Untouched(Rewritten):
        def forward(self, *args, **kwargs):
            return self.net(*args, **kwargs)

    assert not quick(net, Untouched(net), x).passed


@pytest.mark.parametrize("record", [None, "something else", Record("2x1", {}, ())])
def test_without_followers_the_original_itself_is_the_reference(record, net, x):
    twin = Net()
    twin.load_state_dict(net.state_dict())
    twin.record = record
    found = quick(net, twin, {"x": x, "scale": torch.tensor(2.0)})
    assert found.passed
    assert found.outputs.against == "the original"
    assert not quick(net, Net(), x).passed


def test_maps_stored_in_a_type_of_their_own_are_allowed_its_rounding(net, x):
    def stored(probs):
        return probs.to(torch.bfloat16).to(probs.dtype)

    assert not quick(net, Rewritten(net, stored), x).passed
    found = quick(net, Rewritten(net, stored, plan="2x1 dtype=bf16"), x)
    assert found.outputs.tolerance == 2e-2
    assert 1e-6 < found.outputs.error_float64 < 2e-2


def test_a_plan_that_changes_the_function_has_nothing_to_be_equal_to(net, x):
    found = quick(net, Rewritten(net, WRONG["heads mixed"], plan="reuse 2x1 | fiak keys=0.2"), x)
    assert found.passed
    assert found.notes == ("by design, fiak makes another function: errors are for information",)
    assert "by design" in str(found)


class Failing(Rewritten):
    def __init__(self, net, when, error):
        super().__init__(net)
        self.when, self.error = when, error

    def forward(self, x, scale=None):
        if self.when(x):
            raise self.error
        return super().forward(x, scale)


def test_a_batch_size_that_is_refused_is_said_and_one_that_fails_does_not_pass(net, x):
    found = quick(net, Failing(net, lambda x: len(x) == 1, InputError("x: dimension 0 is at least 2")), x)
    assert found.passed
    assert found.outputs.batch_sizes == (2, 3, 5)
    assert found.notes == (
        "batch size 1 was not compared: the rewritten model refuses it (InputError: x: dimension 0 is at least 2)",
    )
    found = quick(net, Failing(net, lambda x: len(x) == 3, RuntimeError("shape '[2, 5]' is invalid\nat line 1")), x)
    assert found.reasons == ("at batch size 3 the rewritten model fails: RuntimeError: shape '[2, 5]' is invalid",)


def test_a_batch_size_that_the_original_refuses_is_not_compared(net, x):
    class Pairs(Net):
        def forward(self, x):
            return super().forward(x.unflatten(0, (-1, 2)).flatten(0, 1))

    pairs = Pairs()
    found = quick(pairs, pairs, x)
    assert found.passed
    assert found.outputs.batch_sizes == (2,)
    assert len(found.notes) == 3
    assert found.notes[0].startswith("batch size 1 was not compared: the original refuses it (RuntimeError: ")


def test_a_rewrite_that_does_not_run_does_not_pass_and_is_not_timed(net, x):
    found = verify(net, Failing(net, lambda x: True, RuntimeError("no")), x, compile="eager")
    assert found.reasons == ("at batch size 2 the rewritten model fails: RuntimeError: no",)
    assert found.compiled is found.speed is None
    assert json.loads(found.to_json())["outputs"]["error_float64"] == "inf"


def test_outputs_have_to_be_complete(net, x):
    class Short(Rewritten):
        def forward(self, *args):
            out = super().forward(*args)
            return {"last": out["last"][:, 1:], "states": out["states"][:2], "more": x}

    assert set(quick(net, Short(net), x).reasons) >= {
        "output last: expected shape (2, 5, 8), found (2, 4, 8)",
        "output states[2]: expected, not found",
        "output longest: expected, not found",
        "output more: found, not expected",
    }


def test_sites_that_the_original_does_not_have_are_an_error(net, x):
    rewritten = Rewritten(net)
    rewritten.record = dataclasses.replace(
        rewritten.record, decisions=(Decision("layers.9#1", "", 0, "follow", "layers.0"),)
    )
    with pytest.raises(UnsupportedError, match=r"layers\.9#1 never ran"):
        quick(net, rewritten, x)


def test_models_that_cannot_be_copied_are_an_error(net, x):
    net.cached = net.layers[0](x)
    with pytest.raises(UnsupportedError, match="verification works on copies, and Net or Rewritten cannot be copied"):
        quick(net, Rewritten(net), x)


def state(model):
    tensors = {name: (id(t), t.dtype, t.clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    modes = [(module.training, len(module._forward_hooks)) for module in model.modules()]
    return tensors, modes, [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(one, other):
    return str(one) == str(other)


def test_nothing_is_changed(net, x):
    rewritten = Rewritten(net)
    net.layers[1].eval()
    net(x)["last"].sum().backward()
    before, random = state(rewritten), torch.get_rng_state()
    verify(net, rewritten, x, compile="eager", seconds=0.0)
    assert same(state(rewritten), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_compilation_is_compared_with_eager_and_graphs_are_counted(net, x):
    lines = []
    found = verify(net, Rewritten(net), x, compile="aot_eager", latency=False, progress=lines.append)
    assert found.passed
    assert found.compiled.backend == "aot_eager"
    assert found.compiled.batch_sizes == (2, 3, 5)
    assert found.compiled.recompiles == max(0, found.compiled.graphs - 1) <= 1
    assert lines == [
        "copying both models",
        "comparing outputs in float64 and float32",
        "compiling both models",
        "changing the batch size of the compiled model",
    ]


def test_a_rewrite_that_breaks_the_graph_does_not_pass(net, x):
    def breaks(probs):
        torch._dynamo.graph_break()
        return probs

    found = verify(net, Rewritten(net, breaks), x, compile="eager", latency=False)
    (reason,) = found.reasons
    assert reason.startswith("torch.compile(fullgraph=True) of the rewritten model fails: ")


def test_a_rewrite_that_computes_something_else_when_compiled_does_not_pass(net, x):
    def changes(probs):
        return probs * 2 if torch.compiler.is_compiling() else probs

    found = verify(net, Rewritten(net, changes), x, compile="eager", latency=False)
    (reason,) = found.reasons
    assert reason.startswith("compiled outputs differ from eager ones by ")


def test_the_whole_of_it_with_inductor(x):
    model = nn.Linear(8, 3)
    found = verify(model, nn.Sequential(model), x, seconds=0.1)
    assert found.passed
    ways = {f"{model} {way}" for model in ("original", "rewritten") for way in ("eager", "compiled")}
    assert found.speed.latency.keys() == ways
    assert found.speed.speedup.keys() == {"eager", "compiled"}
    assert all(value > 0 for value in found.speed.peak_bytes.values())
    data = json.loads(found.to_json())
    assert data["passed"] is True
    assert data["compiled"]["recompiles"] == found.compiled.recompiles
    assert data["speed"]["speedup"]["eager"]["median"] == found.speed.speedup["eager"].median
    assert "latency, compiled" in str(found)


def timed(monkeypatch, original, rewritten):
    def instead(calls, seconds):
        return {name: Timing((original if "original" in name else rewritten,) * 3, 1) for name in calls}

    monkeypatch.setattr(checks, "interleaved", instead)


def test_what_is_no_faster_says_so_and_why(net, x, monkeypatch):
    timed(monkeypatch, original=1.0, rewritten=1.25)
    found = quick(net, Rewritten(net), x, latency=True)
    assert found.passed
    assert found.notes == (
        "no faster here, eager (0.80×), because 1 of 1 followers read a stored map of up to 2×2×5×5 (0.00 MiB); "
        "what was removed is 25.0% of the parameters",
    )
    found = quick(net, Rewritten(net, lowering="recompute"), x, latency=True)
    assert "1 of 1 followers compute scores again, and save projections only" in found.notes[0]
    assert "the model carries no record of a rewrite" in quick(net, net, x, latency=True).notes[0]
    net.record = Record("1x2", {}, (), added={"layers.0.a": 3})
    assert (
        quick(net, net, x, latency=True)
        .notes[0]
        .endswith("because no attention follows another, so every map is computed as before; 3 parameters were added")
    )


def test_what_is_faster_needs_no_reason(net, x, monkeypatch):
    timed(monkeypatch, original=1.0, rewritten=0.5)
    found = quick(net, Rewritten(net), x, latency=True)
    assert found.notes == ()
    assert "2.00× (2.00 to 2.00)" in str(found)


def test_predictions_are_shown_next_to_what_was_measured(net, x):
    found = dataclasses.replace(quick(net, Rewritten(net), x), predicted={"parameters": 1.5, "MACs": 1.25})
    lines = str(found).splitlines()
    assert next(line for line in lines if line.startswith("parameters")).split() == [
        "parameters", "576", "576", "1.00×", "1.50×",
    ]  # fmt: skip
    assert next(line for line in lines if line.startswith("MACs")).split() == ["MACs", "1.25×"]
    assert json.loads(found.to_json())["predicted"] == {"parameters": 1.5, "MACs": 1.25}


def test_a_model_without_batch_or_parameters_is_compared_once():
    identity = nn.Identity()
    found = quick(identity, identity, torch.tensor(3.0))
    assert found.passed
    assert found.outputs.batch_sizes == ()
    assert "batch sizes none" in str(found)
    assert quick(nn.Identity(), nn.Identity(), (3.0,)).reasons == (
        "the outputs hold no tensors, so there is nothing to compare",
    )


@pytest.mark.parametrize(
    ("expected", "found", "error"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([0.0, 0.0], [0.0, 0.5], 0.5),
        ([math.inf, 1.0], [math.inf, 1.0], 0.0),
        ([math.inf, 1.0], [-math.inf, 1.0], math.inf),
        ([math.nan, 1.0], [math.nan, 1.0], 0.0),
        ([math.nan, 1.0], [0.0, 1.0], math.inf),
        ([], [], 0.0),
        ([1, 2], [1, 2], 0.0),
        ([True], [False], math.inf),
        ([1 + 1j], [1 + 1j], 0.0),
    ],
)
def test_errors_are_relative_and_treat_what_is_not_finite(expected, found, error):
    assert difference(torch.tensor(expected), torch.tensor(found)).error == error


def test_the_largest_error_of_all_tensors_is_named():
    found = difference((torch.ones(2), torch.ones(2), torch.ones(1)), (torch.ones(2), torch.zeros(2), torch.ones(1)))
    assert (found.error, found.where, found.compared) == (1.0, "[1]", 3)


def test_types_of_outputs_have_to_agree():
    assert difference(torch.ones(2), torch.ones(2).long()).faults == (
        "output (the tensor): expected torch.float32, found torch.int64",
    )


def test_a_cache_may_be_missing_and_outputs_of_any_form_have_names():
    @dataclasses.dataclass
    class Out:
        a: torch.Tensor
        b: list

    one = torch.ones(1)
    assert list(named_tensors(Out(one, [one, {"c": one}]))) == ["a", "b[0]", "b[1].c"]
    assert difference({"a": one, "past_key_values": (one,)}, {"a": one}).faults == ()


def test_only_casts_from_float64_to_float32_are_kept_wide():
    double, half, index = torch.ones(2).double(), torch.ones(2).half(), torch.arange(2)
    with KeepFloat64():
        assert double.softmax(-1, dtype=torch.float32).dtype == torch.float64
        assert double.to(torch.bfloat16).dtype == torch.bfloat16
        assert half.float().dtype == index.float().dtype == torch.float32
    assert double.float().dtype == torch.float32


def test_an_error_that_is_no_number_does_not_pass():
    outputs = OutputCheck("the original", math.nan, 0.0, 1e-10, "", 1, ())
    assert not Verification("Net", "", "cpu", "float32", {"original": 1, "rewritten": 1}, outputs).passed
