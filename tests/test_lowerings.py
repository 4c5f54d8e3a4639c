"""The two lowerings of a shared map are one function: in value, in gradient, and each consumer with its own dropout."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxreuse
from fxreuse.frontend.load import load_program
from fxreuse.modules import DropoutProbability
from fxreuse.program import Program

from .architectures import randomise
from .running import apply_captured, call, count_maps, gradients

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor]

HEADS, WIDTH = 4, 4


class Layer(nn.Module):
    """Attention with a residual; ``attend`` gets queries, keys, values (batch, heads, tokens, width) and the mask."""

    def __init__(self, attend: Attend, kv_heads: int, value_width: int, dropout: float, width: int) -> None:
        super().__init__()
        self.attend, self.kv_heads, self.dropout = attend, kv_heads, nn.Dropout(dropout)
        self.q = nn.Linear(16, HEADS * width)
        self.k = nn.Linear(16, kv_heads * width)
        self.v = nn.Linear(16, kv_heads * value_width)
        self.o = nn.Linear(HEADS * value_width, 16)

    def heads(self, x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(*x.shape[:2], count, -1).transpose(1, 2)

    def forward(self, x: torch.Tensor, mask: Any) -> torch.Tensor:
        q, k, v = (
            self.heads(self.q(x), HEADS),
            self.heads(self.k(x), self.kv_heads),
            self.heads(self.v(x), self.kv_heads),
        )
        return x + self.o(self.attend(self, q, k, v, mask).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(
        self,
        attend: Attend,
        kv_heads: int = HEADS,
        value_width: int = WIDTH,
        dropout: float = 0.0,
        layers: int = 4,
        width: int = WIDTH,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(attend, kv_heads, value_width, dropout, width) for _ in range(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


def fused(**settings: Any) -> Attend:
    def attend(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, layer.dropout.p if layer.training else 0.0, **settings)

    return attend


def causal_and_padded(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, mask & causal)


def unfused(scores: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]) -> Attend:
    def attend(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
        return layer.dropout(F.softmax(scores(q, k, mask), -1)) @ v

    return attend


def functional(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
    return F.dropout(F.softmax(divided(q, k, mask), -1), layer.dropout.p, layer.training) @ v


def divided(q: torch.Tensor, k: torch.Tensor, mask: Any) -> torch.Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(WIDTH)


def two_biases(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The first bias is scaled with the product, the second is not."""
    distance = torch.arange(q.shape[2], dtype=q.dtype)
    return (q @ k.transpose(-1, -2) + (distance[:, None] - distance).abs()) / 3 * 2 + mask


def capped(q: torch.Tensor, k: torch.Tensor, mask: Any) -> torch.Tensor:
    return 5 * torch.tanh(q @ k.transpose(-1, -2) / 5)


def padding(batch: int, tokens: int) -> torch.Tensor:
    """The last sequence ends two tokens early."""
    keep = torch.ones(batch, 1, 1, tokens, dtype=torch.bool)
    keep[-1, ..., -2:] = False
    return keep


def empty_rows(batch: int, tokens: int) -> torch.Tensor:
    """In the first sequence one query sees nothing, in the last no query sees anything."""
    keep = padding(batch, tokens).expand(batch, 1, tokens, tokens).clone()
    keep[0, :, 1] = False
    keep[-1] = False
    return keep


def additive(batch: int, tokens: int) -> torch.Tensor:
    return torch.randn(batch, 1, tokens, tokens, dtype=torch.float64)


def additive_with_holes(batch: int, tokens: int) -> torch.Tensor:
    return additive(batch, tokens).masked_fill(~empty_rows(batch, tokens), -torch.inf)


CASES: dict[str, tuple[Attend, Any, dict[str, int]]] = {
    "plain": (fused(), None, {}),
    "causal": (fused(is_causal=True), None, {}),
    "causal and padding": (causal_and_padded, padding, {}),
    "padding": (fused(), padding, {}),
    "empty rows": (fused(), empty_rows, {}),
    "additive": (fused(), additive, {}),
    "additive, empty rows": (fused(), additive_with_holes, {}),
    "grouped": (fused(enable_gqa=True), None, {"kv_heads": 2}),
    "grouped, causal, one key": (fused(enable_gqa=True, is_causal=True), None, {"kv_heads": 1}),
    "scale": (fused(scale=0.9), None, {}),
    "wider values": (fused(), padding, {"value_width": 7}),
    "narrower values, scale": (fused(scale=0.2), None, {"value_width": 3}),
    "unfused": (unfused(divided), None, {}),
    "unfused, two biases": (unfused(two_biases), additive, {}),
    "unfused, wider values": (unfused(divided), None, {"value_width": 6}),
}


def inputs(mask: Any, batch: int = 3, tokens: int = 5) -> tuple[torch.Tensor, ...]:
    x = torch.randn(batch, tokens, 16, dtype=torch.float64)
    return (x,) if mask is None else (x, mask(batch, tokens))


def reference(model: Model, x: torch.Tensor, mask: Any = None, leaders: tuple[int, ...] = (0, 0, 2, 2)) -> torch.Tensor:
    """The same model where a follower uses its leader's queries and keys."""
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for index, layer in enumerate(model.layers):
        if leaders[index] == index:
            kept[index] = (layer.heads(layer.q(x), HEADS), layer.heads(layer.k(x), layer.kv_heads))
        value = layer.heads(layer.v(x), layer.kv_heads)
        x = x + layer.o(layer.attend(layer, *kept[leaders[index]], value, mask).transpose(1, 2).flatten(2))
    return x


@pytest.mark.parametrize("name", CASES)
def test_both_lowerings_are_the_shared_map(name: str) -> None:
    attend, mask, sizes = CASES[name]
    model = randomise(Model(attend, **sizes, layers=3)).double()
    program = load_program(model, inputs(mask))
    small = {
        lowering: apply_captured(model, program, f"2x* lowering={lowering}")
        for lowering in ("materialize", "recompute")
    }
    assert (count_maps(small["materialize"]), count_maps(small["recompute"])) == (2, 3)
    for given in (inputs(mask), inputs(mask, 2, 8)):
        expected = reference(model, *given)
        expected_gradients = gradients(model, reference(model, *given))
        assert torch.isfinite(expected).all()
        assert not torch.allclose(expected, model(*given), atol=1e-3)
        near = 1e-12 * max(
            float(gradient.abs().max()) for gradient in expected_gradients.values() if gradient is not None
        )
        for lowering, rewritten in small.items():
            found = call(rewritten, given)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=f"{lowering}: {found - expected}")
            for path, gradient in gradients(rewritten, call(rewritten, given)).items():
                assert gradient is not None, path
                wanted = expected_gradients[path]
                assert wanted is not None, path
                assert torch.isfinite(gradient).all(), path
                torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=near)


@pytest.mark.parametrize("lowering", ["materialize", "recompute"])
def test_a_row_that_sees_nothing_gives_zeros(lowering: str) -> None:
    """What is left of the layer is then its residual and the bias of its output projection."""
    model = randomise(Model(fused(), layers=2)).double()
    given = inputs(empty_rows)
    found = call(fxreuse.apply(model, f"2x1 lowering={lowering}", given), given)
    biases = sum(layer.o.bias for layer in model.layers)
    torch.testing.assert_close(found[-1], given[0][-1] + biases, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0, 1], given[0][0, 1] + biases, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found[1], given[0][1] + biases)


@functools.cache
def with_dropout(kind: str) -> tuple[Model, Program]:
    attend = {"fused": fused(), "unfused": unfused(divided), "functional": functional}[kind]
    model = randomise(Model(attend, dropout=0.5)).double()
    return model, load_program(model, inputs(None))


@pytest.mark.parametrize("kind", ["fused", "unfused", "functional"])
@pytest.mark.parametrize("lowering", ["materialize", "recompute"])
def test_every_layer_has_a_dropout_of_its_own(kind: str, lowering: str) -> None:
    """Found out by silencing one layer's after the other: each leaves less of the noise."""
    given = inputs(None)
    small = apply_captured(*with_dropout(kind), f"4x1 lowering={lowering}")
    dropouts = [part.p for part in _called(small) if isinstance(part, (nn.Dropout, DropoutProbability))]
    assert dropouts == [0.5] * 4
    calm = call(small, given)
    noise = []
    for silent in range(5):
        small.train()
        for layer in small.layers[:silent]:
            layer.eval()
        torch.manual_seed(0)
        first, second = call(small, given), call(small, given)
        noise.append(float((first - second).detach().abs().max()))
    assert all(amount > 1e-3 for amount in noise[:4]), noise
    assert noise[4] == 0.0
    torch.testing.assert_close(first, calm)


def _called(model: nn.Module) -> list[nn.Module]:
    """The submodules that the graphs of a rewritten model call."""
    owners = [module for module in model.modules() if isinstance(getattr(module, "graph", None), torch.fx.Graph)]
    return [owner.get_submodule(str(n.target)) for owner in owners for n in owner.graph.find_nodes(op="call_module")]


def test_dropout_hits_different_places_in_leader_and_follower() -> None:
    given = inputs(None)
    small = apply_captured(*with_dropout("fused"), "4x1 lowering=materialize").train()
    seen: list[torch.Tensor] = []
    for part in small.modules():
        if isinstance(part, nn.Dropout):
            part.register_forward_hook(lambda _, args, result: seen.append((args[0], result)))
    call(small, given)
    assert len(seen) == 4
    assert all(before is seen[0][0] for before, _ in seen)  # the map before dropout is what is shared
    patterns = {tuple((after == 0).flatten().tolist()) for _, after in seen}
    assert len(patterns) == 4
    for before, after in seen:
        torch.testing.assert_close(after[after != 0], 2 * before[after != 0])


def test_a_soft_cap_can_be_stored_but_not_recomputed() -> None:
    model, given = randomise(Model(unfused(capped), layers=3)).double(), inputs(None)
    program = load_program(model, given)
    stored = apply_captured(model, program, "2x* lowering=materialize")
    torch.testing.assert_close(call(stored, given), reference(model, *given), rtol=1e-12, atol=1e-12)
    with pytest.raises(fxreuse.UnsupportedError) as caught:
        apply_captured(model, program, "2x* lowering=recompute")
    said = str(caught.value)
    assert [text for text in ("layers.0", "tanh", "lowering=materialize") if text not in said] == []


@pytest.mark.parametrize("fills", [(-1e9, -1e4), (-1e9, -1e9)])
def test_scores_replaced_by_two_numbers_are_not_recomputed(fills: tuple[float, float]) -> None:
    """Where all keys are hidden, those of the larger number are seen; two equal numbers are one mask."""

    def masked_twice(q: torch.Tensor, k: torch.Tensor, mask: Any) -> torch.Tensor:
        rows, columns = mask[..., :1, :], mask[..., :1, :].transpose(-1, -2)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~rows, fills[0])
        return scores.masked_fill(~columns, fills[1])

    model, given = randomise(Model(unfused(masked_twice), layers=2)).double(), inputs(padding)
    program = load_program(model, given)
    if fills[0] == fills[1]:
        recomputed = apply_captured(model, program, "2x1 lowering=recompute")
        torch.testing.assert_close(
            call(recomputed, given), reference(model, *given, leaders=(0, 0)), rtol=1e-12, atol=1e-12
        )
    else:
        with pytest.raises(fxreuse.UnsupportedError, match=r"replaced by -1e\+09 and by -1e\+04"):
            apply_captured(model, program, "2x1 lowering=recompute")


@pytest.mark.parametrize(("kind", "why"), [("fused", "CPU"), ("unfused", "CPU")])
def test_the_choice_is_explained(kind: str, why: str) -> None:
    model = randomise(Model(fused() if kind == "fused" else unfused(divided), value_width=64, layers=2, width=64))
    record = fxreuse.describe(fxreuse.apply(model, "2x*", torch.randn(3, 5, 16)))
    assert {decision.lowering for decision in record.decisions} == {"materialize"}
    assert why in str(record)
