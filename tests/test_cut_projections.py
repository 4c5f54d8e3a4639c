"""Fused projections of followers keep the rows of their values, whatever their layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

import fxreuse
from fxreuse.checking.reference import MapSharing

from .handwritten import exported
from .running import apply_captured

BATCH, TOKENS, HEADS, DIM = 2, 5, 2, 4
WIDTH = HEADS * DIM
Split = Callable[[torch.Tensor], "tuple[torch.Tensor, ...] | list[torch.Tensor]"]


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH))
        self.bias = nn.Parameter(torch.randn(3 * WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, WIDTH), self.weight).view(*x.shape[:-1], 3 * WIDTH)


class Attention(nn.Module):
    def __init__(self, split: Split, project: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.split, self.qkv, self.out = split, project(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(self.qkv(x))
        out = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return x + self.out(out.transpose(1, 2).reshape(x.shape))


class TimeFirst(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, batch = x.shape[:2]
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.reshape(tokens, batch * HEADS, DIM).transpose(0, 1) for part in parts)
        out = (q @ k.transpose(1, 2) / 2).softmax(-1) @ v
        return x + self.out(out.transpose(0, 1).reshape(tokens, batch, WIDTH))


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x, x, x, need_weights=False)[0]


class Encoder(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module], count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def heads(parts: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [part.view(*part.shape[:2], HEADS, DIM).transpose(1, 2) for part in parts]


def at(y: torch.Tensor, *sizes: int) -> torch.Tensor:
    return y.reshape(*y.shape[:2], *sizes)


def mixing(y: torch.Tensor) -> list[torch.Tensor]:
    """Thirds of an axis on which tokens and rows follow one another."""
    return heads(y.transpose(1, 2).reshape(y.shape).chunk(3, -1))


def linear() -> nn.Module:
    return nn.Linear(WIDTH, 3 * WIDTH)


THIRD = list(range(2 * WIDTH, 3 * WIDTH))
PER_HEAD = [head * 3 * DIM + 2 * DIM + channel for head in range(HEADS) for channel in range(DIM)]
CHANNEL_FIRST = [channel * 3 * HEADS + 2 * HEADS + head for head in range(HEADS) for channel in range(DIM)]
SPLITS: dict[str, tuple[Split, list[int]]] = {
    "thirds, chunk": (lambda y: heads(y.chunk(3, -1)), THIRD),
    "thirds, split": (lambda y: heads(y.split(WIDTH, -1)), THIRD),
    "thirds, split by sizes": (lambda y: heads(y.split([WIDTH] * 3, -1)), THIRD),
    "thirds, slices": (lambda y: heads((y[..., :WIDTH], y[..., WIDTH:-WIDTH], y[..., -WIDTH:])), THIRD),
    "thirds, values first": (lambda y: heads(y.chunk(3, -1)[i] for i in (1, 2, 0)), list(range(WIDTH))),
    "(3, H, D), permute and unbind": (lambda y: at(y, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0), THIRD),
    "(3, H, D), select": (lambda y: [at(y, 3, HEADS, DIM)[:, :, i].transpose(1, 2) for i in range(3)], THIRD),
    "(H, 3, D), unbind": (lambda y: [p.transpose(1, 2) for p in at(y, HEADS, 3, DIM).unbind(3)], PER_HEAD),
    "(H, 3·D), chunk": (lambda y: [p.transpose(1, 2) for p in at(y, HEADS, 3 * DIM).chunk(3, -1)], PER_HEAD),
    "(D, 3, H), unbind": (lambda y: at(y, DIM, 3, HEADS).permute(3, 0, 4, 1, 2).unbind(0), CHANNEL_FIRST),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], list[int], str]] = {
    name: (lambda split=split: Attention(split, linear), rows, "qkv.weight") for name, (split, rows) in SPLITS.items()
}
LAYERS |= {
    "addmm": (lambda: Attention(SPLITS["thirds, chunk"][0], Conv1D), THIRD, "qkv.weight"),
    "addmm, per head": (lambda: Attention(SPLITS["(H, 3, D), unbind"][0], Conv1D), PER_HEAD, "qkv.weight"),
    "time first": (lambda: TimeFirst(heads, linear), THIRD, "qkv.weight"),
    "multi-head": (MultiHead, THIRD, "inner.in_proj_weight"),
}


def shared(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The model run eagerly, layers 1 and 2 with the map of layer 0."""
    path = "layers.{}.inner" if isinstance(model.layers[0], MultiHead) else "layers.{}"
    with MapSharing(model, {(path.format(layer), 0): (path.format(0), 0) for layer in (1, 2)}):
        return model(x)


@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_values_stay(name: str) -> None:
    build, rows, weight = LAYERS[name]
    bias = weight.replace("weight", "bias")
    model = Encoder(build).double()
    nn.init.normal_(model.get_parameter(f"layers.2.{bias}"))
    small = apply_captured(model, exported(model, torch.randn(BATCH, TOKENS, WIDTH).double()), "3x1")
    before, after = model.state_dict(), small.state_dict()
    axis = 1 if name.startswith("addmm") else 0
    for layer in (1, 2):
        for path, dim in ((f"layers.{layer}.{weight}", axis), (f"layers.{layer}.{bias}", 0)):
            assert torch.equal(after[path], before[path].index_select(dim, torch.tensor(rows))), path
    assert torch.equal(after[f"layers.0.{weight}"], before[f"layers.0.{weight}"])
    expected = {f"layers.{layer}.{weight}": 2 * WIDTH * WIDTH for layer in (1, 2)}
    expected |= {f"layers.{layer}.{bias}": 2 * WIDTH for layer in (1, 2)}
    assert fxreuse.describe(small).removed == expected
    for shape in ((BATCH, TOKENS, WIDTH), (3, 7, WIDTH), (1, 4, WIDTH)):
        x = torch.randn(shape).double()
        torch.testing.assert_close(small(x), shared(model, x), rtol=1e-12, atol=1e-12)


def test_the_original_keeps_its_rows() -> None:
    model = Encoder(LAYERS["thirds, chunk"][0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fxreuse.apply(model, "3x1", torch.randn(BATCH, TOKENS, WIDTH))
    assert {name: value.shape for name, value in model.state_dict().items()} == {n: v.shape for n, v in before.items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_frozen_rows_stay_frozen_and_others_learn() -> None:
    model = Encoder(LAYERS["(H, 3, D), unbind"][0])
    model.layers[1].qkv.weight.requires_grad_(False)
    small = fxreuse.apply(model, "3x1", torch.randn(BATCH, TOKENS, WIDTH))
    small(torch.randn(BATCH, TOKENS, WIDTH)).sum().backward()
    parameters = dict(small.named_parameters())
    assert parameters["layers.1.qkv.weight"].grad is None
    assert parameters["layers.2.qkv.weight"].grad is not None


def test_gradients_are_the_rows_of_the_originals() -> None:
    model = Encoder(LAYERS["(H, 3, D), unbind"][0]).double().eval()
    x = torch.randn(BATCH, TOKENS, WIDTH).double()
    small = fxreuse.apply(model, "3x1", x)
    small(x).square().sum().backward()
    cut = dict(small.named_parameters())["layers.1.qkv.weight"].grad
    model.zero_grad()
    shared(model, x).square().sum().backward()
    whole = model.layers[1].qkv.weight.grad
    torch.testing.assert_close(cut, whole[PER_HEAD], rtol=1e-10, atol=1e-12)
    assert not whole[[row for row in range(3 * WIDTH) if row not in PER_HEAD]].any()


def test_a_layout_that_mixes_tokens_and_rows_is_left_alone() -> None:
    model = Encoder(lambda: Attention(mixing, linear)).double().eval()
    x = torch.randn(BATCH, TOKENS, WIDTH).double()
    small = fxreuse.apply(model, "3x1", x)
    assert fxreuse.describe(small).removed == {}
    assert small.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(small(x), shared(model, x), rtol=1e-12, atol=1e-12)


def test_a_weight_that_others_read_is_left_alone() -> None:
    """One projection for all layers: the leader needs every row of it."""
    model = Encoder(LAYERS["thirds, chunk"][0]).double().eval()
    for layer in model.layers[1:]:
        layer.qkv.weight = model.layers[0].qkv.weight
    x = torch.randn(BATCH, TOKENS, WIDTH).double()
    small = fxreuse.apply(model, "3x1", x)
    torch.testing.assert_close(small(x), shared(model, x), rtol=1e-12, atol=1e-12)
    assert dict(small.named_parameters())["layers.0.qkv.weight"] is model.layers[0].qkv.weight
