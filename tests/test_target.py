"""``target=``: one submodule is rewritten in place, and its host stays as it is."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import fxreuse

from .architectures import randomise
from .running import changes, snapshot


def encoder(layers: int = 4) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class Host(nn.Module):
    """Python that no graph could hold, around an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 16)
        self.body = nn.ModuleDict({"encoder": encoder()})
        self.idle = encoder()
        self.calls: list[int] = []

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        self.calls.append(len(x))
        hidden = self.first(x) * scale
        if float(hidden.sum()) > 0:  # depends on values
            hidden = -hidden
        return self.body["encoder"](hidden, is_causal=False)

    def greet(self) -> str:
        return "hello"


@pytest.fixture
def host() -> nn.Module:
    return randomise(Host())


def x(*sizes: int) -> torch.Tensor:
    return torch.randn(*(sizes or (2, 5)), 4)


def test_the_whole_host_cannot_be_captured(host: nn.Module) -> None:
    with pytest.raises(fxreuse.CaptureError, match="target="):
        fxreuse.apply(host, "2x*", x())


def test_only_the_submodule_is_replaced(host: nn.Module) -> None:
    original, inner = copy.deepcopy(host), host.body["encoder"]
    others = {name: part for name, part in host.named_modules() if not name.startswith("body.encoder")}
    assert fxreuse.apply(host, "1x*", x(), target="body.encoder") is host
    assert host.body["encoder"] is not inner
    assert type(host) is Host
    assert host.greet() == "hello"
    assert {name: part for name, part in host.named_modules() if not name.startswith("body.encoder")} == others
    assert host.state_dict().keys() == original.state_dict().keys()
    for given in (x(), -x(), x(3, 7)):
        assert torch.equal(host(given, 0.5), original(given, 0.5))


def test_both_branches_of_the_host_still_run(host: nn.Module) -> None:
    fxreuse.apply(host, "2x*", x(), target="body.encoder")
    seen: list[torch.Tensor] = []
    host.body["encoder"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    given = x()
    host(given)
    hidden = host.first(given)
    assert torch.equal(seen[0], -hidden if float(hidden.sum()) > 0 else hidden)
    with torch.no_grad():
        host.first.weight.neg_()
        host.first.bias.neg_()
    host(given)
    flipped = host.first(given)
    assert torch.equal(seen[1], -flipped if float(flipped.sum()) > 0 else flipped)
    assert (float(hidden.sum()) > 0) != (float(flipped.sum()) > 0)


def test_a_plan_takes_parameters_away_from_the_submodule(host: nn.Module) -> None:
    before = sum(parameter.numel() for parameter in host.parameters())
    fxreuse.apply(host, "2x*", x(), target="body.encoder")
    record = fxreuse.describe(host)
    assert record.parameters_removed == 2 * 2 * (16 * 16 + 16)
    assert before - sum(parameter.numel() for parameter in host.parameters()) == record.parameters_removed
    assert [decision.action for decision in record.decisions] == ["lead", "follow"] * 2


def test_leaves_the_rest_untouched(host: nn.Module) -> None:
    host.train()
    host.body["encoder"].layers[1].eval()
    given, before = x(), snapshot(host)
    fxreuse.apply(host, "1x*", given, target="body.encoder")
    after = snapshot(host)
    for kind in ("mode", "trainable", "values", "hooks", "identity"):
        found = [name for name in changes(before[kind], after[kind]) if "dropout_p" not in name]
        inside = [name for name in found if name.startswith("body.encoder")]
        assert found == inside
        assert kind == "hooks" or inside == [], kind
    assert changes(before["random"], after["random"]) == []
    assert changes(before["globals"], after["globals"]) == []


@pytest.mark.parametrize(
    ("target", "error", "says"),
    [
        ("body.decoder", fxreuse.InputError, ["Host", "'body.decoder'", "body.encoder"]),
        ("encoder", fxreuse.InputError, ["Host", "'encoder'", "did you mean 'body.encoder'?"]),
        ("idle", fxreuse.UnsupportedError, ["Host", "'idle'", "example_inputs"]),
        ("first", fxreuse.UnsupportedError, ["Linear", "no attention"]),
    ],
)
def test_a_wrong_target_is_refused(host: nn.Module, target: str, error: type, says: list[str]) -> None:
    given, before = x(), snapshot(host)
    with pytest.raises(error) as caught:
        fxreuse.apply(host, "2x*", given, target=target)
    assert [text for text in says if text not in str(caught.value)] == []
    after = snapshot(host)
    assert {kind: changes(before[kind], after[kind]) for kind in before} == {kind: [] for kind in before}


class Twice(nn.Module):
    """A host that calls one encoder on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder(1)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        first = self.encoder(left)
        return first.mean(1) + self.encoder(right).mean(1)


class Stepwise(nn.Module):
    """A host that calls the layers of its encoder itself, and writes into its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"inner": encoder(2)})
        self.unregistered = [encoder(1)]

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        hidden = batch["x"].mul_(2)
        for layer in self.body["inner"].layers:
            hidden = layer(hidden)
        batch["hidden"] = hidden
        return batch


SEQUENCE, BATCH = torch.randn(2, 5, 16), {"x": torch.randn(2, 5, 16)}


@pytest.mark.parametrize(
    ("build", "inputs", "target", "error", "says"),
    [
        (
            Twice,
            (SEQUENCE, SEQUENCE[:, :3]),
            "encoder",
            fxreuse.UnsupportedError,
            "Twice calls 'encoder' 2 times | test_target.py: | first = self.encoder(left) with 2×5×16 | "
            "return first.mean(1) | with 2×3×16 | fxreuse.apply(model.encoder, plan, inputs)",
        ),
        (
            Stepwise,
            (BATCH,),
            "body.inner",
            fxreuse.UnsupportedError,
            "Stepwise does not call 'body.inner' | test_target.py: | parts are called one by one | "
            "'body.inner.layers.0'",
        ),
        (Stepwise, (BATCH,), "", fxreuse.InputError, "target='' is Stepwise itself | leave target= out | 'body'"),
        (Stepwise, (BATCH,), 3, fxreuse.InputError, "the path of a submodule of Stepwise | found int"),
        (Stepwise, (BATCH,), "inner", fxreuse.InputError, "no submodule 'inner' | did you mean 'body.inner'?"),
        (
            Stepwise,
            (BATCH,),
            "body.inner.layers.0.linear1.weight",
            fxreuse.InputError,
            "no module at 'body.inner.layers.0.linear1.weight' | did you mean 'body.inner.layers.0.linear1'",
        ),
        (
            Stepwise,
            ({},),
            "body.inner.layers.0",
            fxreuse.InputError,
            "Stepwise itself fails | before it calls 'body.inner.layers.0' | KeyError: 'x' | "
            'batch["x"].mul_(2) | forward takes (batch',
        ),
    ],
    ids=["twice", "never", "root", "number", "partial path", "parameter", "host fails"],
)
def test_a_target_that_cannot_be_served(
    build: type[nn.Module], inputs: Any, target: Any, error: type, says: str
) -> None:
    """The host, the path, the line of its code, and what to do; host and inputs stay as they were."""
    host = build()
    given, before = copy.deepcopy(inputs), snapshot(host)
    with pytest.raises(error) as caught:
        fxreuse.find_attention(host, inputs, target=target)
    assert [text for text in says.split(" | ") if text not in str(caught.value)] == [], str(caught.value)
    assert changes(before, snapshot(host)) == []
    torch.testing.assert_close(inputs, given, rtol=0, atol=0)


def test_a_host_that_writes_into_its_inputs_gets_copies() -> None:
    host, batch = Stepwise(), {"x": torch.randn(2, 5, 16)}
    given = copy.deepcopy(batch)
    fxreuse.apply(host, "1x1", (batch,), target="body.inner.layers.1")
    torch.testing.assert_close(batch, given, rtol=0, atol=0)


class Direct(nn.Module):
    """A host that goes past the hooks of its encoder, knows it under two names, and reads an attribute of it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder(1)
        self.encoder.scale = 3.0
        self.alias = self.encoder

    def forward(self, x: torch.Tensor, late: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.alias.forward(x, is_causal=False) * self.encoder.scale
        if late is None:
            raise ValueError("what comes after the encoder is missing")
        return hidden + late


@pytest.mark.parametrize("target", ["encoder", "alias"])
def test_every_name_of_the_target_is_replaced(target: str) -> None:
    host = randomise(Direct())
    original, given = copy.deepcopy(host), torch.randn(3, 6, 16)
    fxreuse.apply(host, "1x*", (SEQUENCE, SEQUENCE), target=target)
    assert host.encoder is host.alias
    assert fxreuse.describe(host).plan == "1x*"
    torch.testing.assert_close(host(given, given), original(given, given))


def test_what_fails_after_the_target_does_not_matter() -> None:
    assert len(fxreuse.find_attention(Direct(), SEQUENCE, target="encoder")) == 1


class Optional(nn.Module):
    """An encoder that takes some of its arguments by ``**options``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = encoder(1)

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.body(x + options["shift"] if options["shifted"] else x)


def test_arguments_by_keyword_leave_sizes_free() -> None:
    model = randomise(Optional())
    rewritten = fxreuse.apply(model, "1x*", {"x": SEQUENCE, "shift": SEQUENCE, "shifted": True})
    given = torch.randn(3, 7, 16)
    torch.testing.assert_close(rewritten(given, shift=given, shifted=True), model(given, shift=given, shifted=True))
    assert "forward" not in vars(model)


def test_a_failing_plan_leaves_the_host_as_it_was(host: nn.Module) -> None:
    before = snapshot(host)
    inner = host.body["encoder"]
    with pytest.raises(fxreuse.PlanError):
        fxreuse.apply(host, "3x3", x(), target="body.encoder")
    assert host.body["encoder"] is inner
    assert changes(before["hooks"], snapshot(host)["hooks"]) == []


def test_finds_attention_in_a_target_without_replacing_it(host: nn.Module) -> None:
    inner = host.body["encoder"]
    sites = fxreuse.find_attention(host, x(), target="body.encoder")
    assert [str(site) for site in sites] == [f"layers.{i}.self_attn" for i in range(4)]
    assert host.body["encoder"] is inner


def test_describes_a_host_by_its_submodule(host: nn.Module) -> None:
    with pytest.raises(fxreuse.FxReuseError, match="Host"):
        fxreuse.describe(host)
    fxreuse.apply(host, "4x1", x(), target="body.encoder")
    assert fxreuse.describe(host).plan == "4x1"
    assert fxreuse.describe(host) is fxreuse.describe(host.body["encoder"])


def whisper() -> nn.Module:
    sizes = {f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in _SIZES.items()}
    lengths = {"max_source_positions": 24, "max_target_positions": 32, "num_mel_bins": 8}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    model = hf.WhisperForConditionalGeneration(hf.WhisperConfig(vocab_size=99, d_model=16, **sizes, **lengths, **ends))
    return randomise(model)


_SIZES = {"layers": 2, "attention_heads": 2, "ffn_dim": 32}


def generate(model: nn.Module, features: torch.Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
        return model.generate(features, **settings)


def heard(model: nn.Module, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = generate(model, features)
    return found.sequences, torch.stack(found.scores)


def test_whisper_generates() -> None:
    model, features = whisper(), torch.randn(2, 8, 48)
    inputs = {"input_features": features, "decoder_input_ids": torch.tensor([[1, 4, 5]] * 2)}
    expected, scores = heard(model, features)
    assert expected.unique().numel() > 2
    identity = fxreuse.apply(copy.deepcopy(model), "1x*", inputs, target="model.encoder")
    found, found_scores = heard(identity, features)
    assert torch.equal(found, expected)
    assert torch.equal(found_scores, scores)
    shared = fxreuse.apply(model, "2x*", inputs, target="model.encoder")
    assert type(shared) is hf.WhisperForConditionalGeneration
    _, found_scores = heard(shared, features)
    assert torch.isfinite(found_scores).any()
    count = min(len(found_scores), len(scores))
    assert not torch.equal(found_scores[:count], scores[:count])
    assert [decision.action for decision in fxreuse.describe(shared).decisions] == ["lead", "follow"]
