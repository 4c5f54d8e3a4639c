"""What cannot be done is refused with an error that says where, expected against found, and changes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import fxreuse

from .architectures import randomise
from .running import call, changes, snapshot
from .strategies import Layer, Spec, Transformer

SPEC = Spec(layers=4, heads=2, kv_heads=2, head_dim=4)


def transformer(**settings: Any) -> torch.nn.Module:
    return randomise(Transformer(dataclasses.replace(SPEC, **settings)))


class Heads(torch.nn.Module):
    """Three layers of one width; the last one has more heads."""

    def __init__(self) -> None:
        super().__init__()
        specs = [SPEC, SPEC, dataclasses.replace(SPEC, heads=4, kv_heads=4, head_dim=2)]
        self.layers = torch.nn.ModuleList(Layer(spec, windowed=False) for spec in specs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, None, None)
        return x


class Pooled(torch.nn.Module):
    """A softmax over tokens that weighs them for a mean: one query that is a parameter, no map between tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.head = torch.nn.Linear(8, 1), torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.score(x).softmax(dim=1)
        return self.head((weights * x).sum(dim=1)).softmax(-1)


class Branching(torch.nn.Module):
    """A branch on values, which no graph can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Transformer(SPEC)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = -x
        return self.body(x)


class Twins(torch.nn.Module):
    """Two stacks of as many layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Transformer(SPEC), Transformer(SPEC)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) + self.right(x.flip(1))


class Flex(torch.nn.Module):
    """FlexAttention with a penalty on distance; under gradients torch refuses it on a CPU, without it is exported."""

    def __init__(self, gradients: bool) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(8, 24).requires_grad_(gradients)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return x + flex_attention(q, k, v, score_mod=penalty).transpose(1, 2).flatten(2)


def penalty(score: torch.Tensor, b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return score - (q - k).abs()


class Mapped(torch.nn.Module):
    """An attention whose batch is a `torch.vmap`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return (q @ k.mT).softmax(-1) @ v

        return x + torch.vmap(attend)(*self.qkv(x).chunk(3, -1))


X = {"x": torch.zeros(2, 5, 8)}


@dataclasses.dataclass(frozen=True)
class Refusal:
    build: Callable[[], torch.nn.Module]
    plan: Any
    inputs: Any
    error: type[Exception]
    says: tuple[str, ...]


FLEX = ("return x + flex_attention(", "FlexAttention is not rewritten", "scaled_dot_product_attention")
REFUSALS = {
    "plan for more layers": Refusal(transformer, "3x3", X, fxreuse.PlanError, ("9 layers", "4 layers", "2x2", "4x1")),
    "plan for fewer layers": Refusal(transformer, "FSS", X, fxreuse.PlanError, ("3 layers", "4 layers", "2x2")),
    "unreadable plan": Refusal(transformer, "two", X, fxreuse.PlanError, ("'two'", "4x4")),
    "no plan": Refusal(transformer, None, X, fxreuse.PlanError, ("NoneType", "4x4")),
    "unknown stack": Refusal(transformer, "2x* stack=decoder", X, fxreuse.PlanError, ("decoder", "layers.{i}")),
    "two stacks": Refusal(Twins, "2x*", X, fxreuse.PlanError, ("left.layers.{i}", "right.layers.{i}", "stack=")),
    "no attention": Refusal(Pooled, "2x*", X, fxreuse.FxReuseError, ("attention",)),
    "no softmax": Refusal(lambda: torch.nn.Linear(8, 8), "2x*", X["x"], fxreuse.FxReuseError, ("attention",)),
    "different heads": Refusal(
        Heads, "1+2", X, fxreuse.FxReuseError, ("layers.1.attention", "layers.2.attention", "2", "4")
    ),
    "different masks": Refusal(
        lambda: transformer(mask="alternating"),
        "leaders=0,1,0,0",
        X,
        fxreuse.FxReuseError,
        ("layers.3.attention", "layers.0.attention", "mask"),
    ),
    "branch on values": Refusal(
        Branching,
        "2x*",
        X,
        fxreuse.CaptureError,
        ("test_bad_input.py:", "if x.sum() > 0", "depends on the values of a tensor", "target='body'", "torch.where"),
    ),
    "FlexAttention": Refusal(
        lambda: Flex(gradients=False), "2x*", X, fxreuse.UnsupportedError, ("test_bad_input.py:", *FLEX)
    ),
    "FlexAttention with gradients": Refusal(
        lambda: Flex(gradients=True), "2x*", X, fxreuse.UnsupportedError, ("test_bad_input.py:", *FLEX)
    ),
    "torch.vmap": Refusal(
        Mapped, "2x*", X, fxreuse.UnsupportedError, ("test_bad_input.py:", "return x + torch.vmap", "broadcasting")
    ),
    "missing argument": Refusal(lambda: transformer(cross=True), "2x*", {}, fxreuse.InputError, ("x",)),
    "unknown argument": Refusal(transformer, "2x*", {**X, "frames": X["x"]}, fxreuse.InputError, ("frames",)),
    "too many arguments": Refusal(transformer, "2x*", (X["x"],) * 4, fxreuse.InputError, ("4", "context")),
    "no tensor": Refusal(transformer, "2x*", "text", fxreuse.InputError, ("str",)),
    "an array": Refusal(transformer, "2x*", X["x"].numpy(), fxreuse.InputError, ("ndarray", "forward takes (x")),
    "an array inside": Refusal(transformer, "2x*", {"x": X["x"].numpy()}, fxreuse.FxReuseError, ("ndarray",)),
    "a list of tensors": Refusal(transformer, "2x*", [X["x"]], fxreuse.InputError, ("list", "tuple(inputs)")),
    "whole numbers": Refusal(transformer, "2x*", X["x"].long(), fxreuse.InputError, ("dtype",)),
    "another device": Refusal(transformer, "2x*", X["x"].to("meta"), fxreuse.FxReuseError, ("meta",)),
    "an empty batch": Refusal(transformer, "2x*", X["x"][:0], fxreuse.InputError, ("batch of 0",)),
    "wrong width": Refusal(transformer, "2x*", torch.zeros(2, 5, 6), fxreuse.FxReuseError, ("6", "8", " in forward: ")),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS.keys())
def test_is_refused(refusal: Refusal) -> None:
    model = refusal.build().train()
    before = snapshot(model)
    with pytest.raises(fxreuse.FxReuseError) as caught:
        fxreuse.apply(model, refusal.plan, refusal.inputs)
    after = snapshot(model)
    assert isinstance(caught.value, refusal.error)
    assert [text for text in refusal.says if text not in str(caught.value)] == [], str(caught.value)
    assert {kind: changes(before[kind], after[kind]) for kind in before} == {kind: [] for kind in before}


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (torch.nn.Linear, "the class Linear; make one by calling the class"),
        ("bert-base-uncased", "the string 'bert-base-uncased'; load the model first"),
        (F.softmax, "a function; wrap it in a torch.nn.Module"),
        (None, "a NoneType"),
        (torch.jit.script(torch.nn.Linear(2, 2)), "a scripted Linear; pass the module that it was scripted from"),
    ],
    ids=["class", "name", "function", "nothing", "scripted"],
)
def test_what_is_no_module_is_refused(model: Any, says: str) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: fxreuse.apply(model, "2x*", X),
        lambda: fxreuse.apply(model, "2x*", X, target="layers"),
        lambda: fxreuse.find_attention(model),
        lambda: fxreuse.verify(model, model, X),
        lambda: fxreuse.verify(transformer(), model, X),
        lambda: fxreuse.describe(model),
    ]
    for called in calls:
        with pytest.raises(fxreuse.InputError) as caught:
            called()
        assert says in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "inputs", "says"),
    [
        ({"device": "nonsense"}, X, "device 'nonsense' cannot be used here"),
        ({"device": "mtia"}, X, "device 'mtia' cannot be used here"),
        ({"tolerance": "small"}, X, "tolerance: expected a number, found 'small'"),
        ({}, X["x"][..., :5], "Transformer itself fails on these example_inputs"),
    ],
    ids=["device", "absent device", "tolerance", "inputs"],
)
def test_what_verify_refuses(settings: dict[str, Any], inputs: Any, says: str) -> None:
    model = transformer()
    with pytest.raises(fxreuse.InputError) as caught:
        fxreuse.verify(model, model, inputs, compile=False, latency=False, **settings)
    assert says in str(caught.value)


_ANY_MODEL = st.sampled_from([None, "bert", torch.nn.Linear, 3, transformer(), Twins(), torch.nn.Identity()])
_TENSORS = [X["x"], X["x"][0], X["x"].long(), X["x"].bool(), X["x"].double(), X["x"][:, :0], torch.zeros(())]
_ANY_VALUE = st.sampled_from([*_TENSORS, None, 3, 2.5, "x", b"x", [1.0], (), X["x"].numpy(), range(3), object()])
_ANY_INPUTS = st.one_of(
    _ANY_VALUE,
    st.lists(_ANY_VALUE, max_size=2).map(tuple),
    st.lists(_ANY_VALUE, max_size=2),
    st.dictionaries(st.sampled_from(["x", "mask", "context", "y", 1]), _ANY_VALUE, max_size=2),
)
_ANY_TARGET = st.sampled_from([None, "", "layers", "layers.0", "left", "left.layers.9", "..", 3, "attention", "💥"])
_ANY_PLAN = st.one_of(
    st.text(max_size=6), st.sampled_from(["2x2", "1x*", "9x9", "2x* stack=q", None, 3, "leaders=0,9"])
)


@given(model=_ANY_MODEL, plan=_ANY_PLAN, inputs=_ANY_INPUTS, target=_ANY_TARGET)
def test_nothing_but_errors_of_the_package_comes_out(model: Any, plan: Any, inputs: Any, target: Any) -> None:
    """Whatever is passed: it is served, or refused in an error of the package, and the model is as it was."""
    before = snapshot(model) if isinstance(model, torch.nn.Module) else None
    with contextlib.suppress(fxreuse.FxReuseError):
        fxreuse.Plan.of(plan)
    with contextlib.suppress(fxreuse.FxReuseError):
        fxreuse.find_attention(model, inputs, target=target)
    if before is not None:
        assert changes(before, snapshot(model)) == []


def test_inputs_that_cannot_be_guessed_are_asked_for_by_name() -> None:
    class Scored(torch.nn.Module):
        def forward(self, left: torch.Tensor, right: list[torch.Tensor], *, power: int) -> torch.Tensor:
            return F.softmax(left @ right[0].transpose(1, 2), -1) ** power @ right[1]

    with pytest.raises(fxreuse.InputError) as caught:
        fxreuse.apply(Scored(), "2x*")
    assert [name for name in ("left", "right", "power", "example_inputs") if name not in str(caught.value)] == []


def test_describe_wants_a_rewritten_model() -> None:
    with pytest.raises(fxreuse.FxReuseError, match="Linear"):
        fxreuse.describe(torch.nn.Linear(2, 2))


class EvenLengths(torch.nn.Module):
    """Another function where the length is a multiple of four."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Transformer(SPEC)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return 2 * y if x.shape[1] % 4 == 0 else y


@pytest.mark.parametrize(("captured", "same", "other"), [(8, 12, 10), (6, 7, 8)])
def test_a_size_that_takes_another_branch_is_refused(captured: int, same: int, other: int) -> None:
    model = randomise(EvenLengths())
    rewritten = fxreuse.apply(model, "1x*", {"x": torch.randn(2, captured, 8)})
    x = torch.randn(3, same, 8)
    torch.testing.assert_close(rewritten(x), model(x))
    with pytest.raises(fxreuse.InputError) as caught:
        rewritten(torch.randn(3, other, 8))
    assert [text for text in ("x", str(other), "4") if text not in str(caught.value)] == []


@dataclasses.dataclass
class Captured:
    """One model rewritten twice: captured with its optional mask and without."""

    model: torch.nn.Module
    bare: torch.nn.Module
    masked: torch.nn.Module
    x: torch.Tensor
    mask: torch.Tensor


@pytest.fixture(scope="module")
def captured() -> Captured:
    torch.manual_seed(0)
    model = transformer(padding="bool")
    x, mask = SPEC.inputs(3, 6, 6)["x"], torch.ones(3, 6, dtype=torch.long)
    mask[:, 4:] = 0
    bare = fxreuse.apply(model, "1x*", (torch.randn(2, 5, 8),))
    masked = fxreuse.apply(model, "1x*", {"x": torch.randn(2, 5, 8), "mask": torch.ones(2, 5, dtype=torch.long)})
    return Captured(model, bare, masked, x, mask)


def test_a_default_may_be_spelled_out(captured: Captured) -> None:
    expected = captured.model(captured.x)
    torch.testing.assert_close(captured.bare(captured.x, None, mask=None), expected)
    torch.testing.assert_close(captured.bare(x=captured.x), expected)


@pytest.mark.parametrize("which", ["argument that was not captured", "captured argument that is missing"])
def test_another_set_of_arguments_is_never_ignored(captured: Captured, which: str) -> None:
    """Captured anew or refused by name; both are right."""
    missing = which.endswith("missing")
    rewritten = captured.masked if missing else captured.bare
    inputs = {"x": captured.x} if missing else {"x": captured.x, "mask": captured.mask}
    assert not torch.allclose(captured.model(captured.x), captured.model(captured.x, mask=captured.mask))
    try:
        actual = call(rewritten, inputs)
    except fxreuse.InputError as error:
        found = str(error)
    else:
        torch.testing.assert_close(actual, call(captured.model, inputs))
        return
    assert "mask" in found


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"x": torch.zeros(5, 8)}, ("x", "3", "2")),
        ({"x": torch.zeros(2, 5, 9)}, ("x", "8", "9")),
        ({"x": torch.zeros(2, 5, 8), "frames": 3}, ("frames",)),
        ({}, ("x",)),
        ({"x": [1.0, 2.0]}, ("x", "tensor", "[1.0, 2.0]")),
    ],
    ids=["rank", "width", "unknown name", "nothing", "no tensor"],
)
def test_a_call_that_does_not_fit_is_refused(captured: Captured, inputs: dict[str, Any], says: tuple[str, ...]) -> None:
    """With the class of error that Python has for it, too."""
    with pytest.raises(TypeError) as caught:
        captured.bare(**inputs)
    assert [text for text in says if text not in str(caught.value)] == [], str(caught.value)
