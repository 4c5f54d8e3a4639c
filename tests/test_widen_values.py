"""Wider values: the same function at first, another one after training, and nothing else changed."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxreuse
from fxreuse.attention import AttentionSites
from fxreuse.checking.reference import MapSharing
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program
from fxreuse.layouts.layout import output_layout, value_layout
from fxreuse.passes.widen_values import widen_values
from fxreuse.program import Program
from fxreuse.tree import reads

from .handwritten import exported
from .meta_values import assert_values_known

reuse = importlib.import_module("fxreuse.passes.reuse").reuse

HEADS, DIM, LAYERS = 2, 4, 3
WIDTH = HEADS * DIM
LEADERS = (0, 0, 0)


class Layer(nn.Module):
    """Attention with projections of their own; the values' width is that of their weight."""

    def __init__(self, values: int = DIM, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, kv_heads * DIM)
        self.v, self.out = nn.Linear(WIDTH, kv_heads * values), nn.Linear(HEADS * values, WIDTH)

    def split(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

    def operands(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.split(q, HEADS), self.split(k, self.kv_heads), self.split(v, self.kv_heads)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT / 2).softmax(-1) @ v

    def join(self, y: torch.Tensor) -> torch.Tensor:
        return y.transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(self.join(self.attend(*self.operands(x))))


class FusedOperator(Layer):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads < HEADS)


class GroupedFused(FusedOperator):
    def __init__(self, values: int = DIM) -> None:
        super().__init__(values, 1)


class GroupedByHand(Layer):
    def __init__(self, values: int = DIM) -> None:
        super().__init__(values, 1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (p[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for p in (k, v))
        return super().attend(q, k, v)


class Thirds(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        del self.q, self.k, self.v

    def operands(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.split(q, HEADS), self.split(k, HEADS), self.split(v, HEADS)


class Interleaved(Thirds):
    def operands(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(x).view(*x.shape[:2], HEADS, 3 * DIM).transpose(1, 2).chunk(3, -1)
        return q, k, v


class Transposed(Layer):
    """Weights as GPT-2 has them, and heads within channels at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))
        del self.v

    def operands(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        v = torch.addmm(self.b, x.view(-1, WIDTH), self.w).view(*x.shape[:2], -1)
        return self.split(self.q(x), HEADS), self.split(self.k(x), HEADS), self.split(v * 2, HEADS)

    def join(self, y: torch.Tensor) -> torch.Tensor:
        return y.permute(0, 2, 3, 1).flatten(2) * 0.5


class ByBmm(Layer):
    """Heads and batch in one axis; padding is taken out of the values before they are split."""

    def split(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return super().split(x, heads).flatten(0, 1)

    def operands(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.q(x), self.k(x), self.v(x).masked_fill(x[..., :1] > 1, 0.0)
        return self.split(q, HEADS), self.split(k, HEADS), self.split(v, HEADS)

    def join(self, y: torch.Tensor) -> torch.Tensor:
        return super().join(y.view(-1, HEADS, *y.shape[1:]))


class Relative(Layer):
    """A Conformer's attention: u, v, a position projection and the relative shift."""

    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Linear(WIDTH, WIDTH, bias=False)
        self.u, self.w = nn.Parameter(torch.randn(HEADS, DIM)), nn.Parameter(torch.randn(HEADS, DIM))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        length = q.shape[2]
        table = torch.arange(2 * length - 1).to(q)[:, None] * torch.linspace(0, 1, WIDTH).to(q)
        p = self.pos(table.sin()).view(-1, HEADS, DIM).transpose(0, 1)
        shifted = F.pad((q + self.w[:, None]) @ p.mT, (1, 0))
        shifted = shifted.view(*q.shape[:2], -1, length)[:, :, 1:].reshape(*q.shape[:3], -1)[..., :length]
        return (((q + self.u[:, None]) @ k.mT + shifted) / 2).softmax(-1) @ v


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x, x, x, need_weights=False)[0]


class Encoder(nn.Module):
    def __init__(self, layer: Callable[..., nn.Module], layers: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def reused(program: Program, lowering: str = "materialize") -> tuple[Program, AttentionSites]:
    """All layers use the map of the first."""
    sites = find(program)
    return reuse(program, list(sites), [0] * len(sites), lowering).program, sites


@functools.cache
def double(kind: Callable[..., nn.Module]) -> Program:
    return exported(Encoder(kind).double(), torch.randn(3, 5, WIDTH).double())


KINDS = (
    Layer, FusedOperator, GroupedFused, GroupedByHand, Thirds, Interleaved, Transposed, ByBmm, Relative, MultiHead,
)  # fmt: skip
RECOMPUTED = (Layer, GroupedFused, Interleaved)


@pytest.mark.parametrize(
    ("kind", "lowering"),
    [(kind, "materialize") for kind in KINDS] + [(kind, "recompute") for kind in RECOMPUTED],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_function_stays(kind: Callable[..., nn.Module], lowering: str) -> None:
    before, sites = reused(double(kind), lowering)
    after = before.copy()
    grown = widen_values(after, sites[1:], 2)
    after.check()
    old, new = reads(before), reads(after)
    changed = {path for path in new if new[path].shape != old[path].shape}
    assert grown == {path: new[path].numel() - old[path].numel() for path in changed}
    assert all(new[path] is old[path] for path in new.keys() - changed)
    for site in sites[1:]:
        values, output = value_layout(after, site), output_layout(after, site)
        assert {values.weight, output.weight} <= changed
        assert values.rows.shape[1] == output.rows.shape[1] == 2 * DIM
        assert torch.equal(values.rows.flatten(), torch.arange(values.rows.numel()))  # by head, then by channel
        fresh = new[output.weight].index_select(output.axis, output.rows[:, DIM:].flatten())
        assert not fresh.any()
    for shape in ((3, 5, WIDTH), (2, 7, WIDTH), (1, 4, WIDTH)):
        y = torch.randn(shape).double()
        torch.testing.assert_close(after.module(y), before.module(y), rtol=1e-12, atol=1e-12)
    assert_values_known(after)


def reference(after: Program, kind: Callable[..., nn.Module]) -> Encoder:
    """The same class with wider values in its followers, and with the parameters of the widened program."""
    model = Encoder(kind).double()
    model.layers = nn.ModuleList(kind(values=DIM if layer == 0 else 2 * DIM) for layer in range(LAYERS))
    model.double().load_state_dict({path: value.detach() for path, value in reads(after).items()}, strict=False)
    return model


@pytest.mark.parametrize("kind", [Layer, GroupedFused, GroupedByHand], ids=lambda kind: kind.__name__)
def test_new_channels_are_channels_of_their_heads(kind: Callable[..., nn.Module]) -> None:
    """With columns that are no longer zero: values and gradients are those of the class with wider values."""
    x = torch.randn(3, 5, WIDTH).double()
    program, sites = reused(double(kind))
    widen_values(program, sites[1:], 2)
    own = {path: value for path, value in reads(program).items() if isinstance(value, nn.Parameter)}
    with torch.no_grad():
        for value in own.values():
            value.copy_(torch.randn_like(value) / 2)
    model = reference(program, kind)
    with MapSharing(model, {(f"layers.{layer}", 0): ("layers.0", 0) for layer in (1, 2)}):
        expected = model(x)
    (actual,) = program.module(x)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    actual.square().sum().backward()
    expected.square().sum().backward()
    wanted = dict(model.named_parameters())
    for path, value in own.items():
        torch.testing.assert_close(value.grad, wanted[path].grad, rtol=1e-10, atol=1e-10, msg=path)


def test_wider_values_learn() -> None:
    x, y = torch.randn(8, 6, WIDTH), torch.randn(8, 6, WIDTH)
    program, sites = reused(exported(Encoder(Layer), x))
    widen_values(program, sites[1:], 2)
    parameters = [value for value in reads(program).values() if isinstance(value, nn.Parameter)]
    optimizer = torch.optim.SGD(parameters, 0.5)
    for _ in range(10):
        optimizer.zero_grad()
        F.mse_loss(program.module(x)[0], y).backward()
        optimizer.step()
    own = reads(program)
    for layer in (1, 2):
        values = own[f"layers.{layer}.v.weight"].view(HEADS, 2 * DIM, WIDTH)
        columns = own[f"layers.{layer}.out.weight"].view(WIDTH, HEADS, 2 * DIM)
        for head in range(HEADS):
            assert torch.linalg.matrix_rank(values[head], rtol=1e-3) > DIM
            assert torch.linalg.matrix_rank(columns[:, head] @ values[head], rtol=1e-3) > DIM


def test_three_times_as_wide_and_once_again() -> None:
    x = torch.randn(3, 5, WIDTH).double()
    program, sites = reused(double(Interleaved))
    expected = program.module(x)
    assert widen_values(program, sites[1:], 1) == {}
    widen_values(program, sites[1:], 3)
    widen_values(program, sites[1:], 2)
    assert reads(program)["layers.1.qkv.weight"].shape == (6 * WIDTH, WIDTH)
    torch.testing.assert_close(program.module(x), expected, rtol=1e-12, atol=1e-12)


def test_new_rows_are_initialised_as_the_module_does_it() -> None:
    """A Linear's are uniform up to 1/√d, whatever it has learned; a Parameter of no such module gives its deviation."""
    x = torch.randn(3, 5, WIDTH)
    model = Encoder(Layer)
    model.layers[1].v.weight.data.mul_(100)
    model.layers[1].v.requires_grad_(False)
    program, sites = reused(load_program(model, x))
    widen_values(program, sites[1:], 2)
    fresh = reads(program)["layers.1.v.weight"].view(HEADS, 2, DIM, WIDTH)[:, 1]
    assert 0.5 * WIDTH**-0.5 < fresh.abs().max() <= WIDTH**-0.5
    assert reads(program)["layers.1.v.bias"].view(HEADS, 2, DIM)[:, 1].any()
    assert not reads(program)["layers.1.v.weight"].requires_grad
    assert reads(program)["layers.1.out.weight"].requires_grad
    model = Encoder(Transposed)
    model.layers[1].w.data.mul_(100)
    program, sites = reused(load_program(model, x))
    widen_values(program, sites[1:], 2)
    fresh = reads(program)["layers.1.w"].view(WIDTH, HEADS, 2, DIM)[:, :, 1]
    assert 50 < fresh.std() < 200
    assert not reads(program)["layers.1.b"].view(HEADS, 2, DIM)[:, 1].any()


def test_a_model_without_weights_gets_none() -> None:
    with torch.device("meta"):
        model = Encoder(Thirds)
    program, sites = reused(load_program(model, torch.randn(3, 5, WIDTH, device="meta")))
    grown = widen_values(program, sites[1:], 2)
    assert grown["layers.1.qkv.weight"] == WIDTH * WIDTH
    assert all(value.is_meta for value in reads(program).values())
    assert program.module(torch.randn(2, 4, WIDTH, device="meta"))[0].shape == (2, 4, WIDTH)


def test_public_models() -> None:
    hf = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
    gpt2 = hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, use_cache=False)
    models = [
        (hf.BertModel(hf.BertConfig(**sizes, intermediate_size=32)), "encoder.layer.1.attention.self.value.weight", 0),
        (
            hf.GPT2Model(gpt2),
            "h.1.attn.c_attn.weight",
            1,
        ),
    ]
    ids = torch.randint(3, 50, (2, 7))
    for model, path, axis in models:
        program = load_program(torch.export.export(model.double().eval(), (ids,), strict=False))
        before, sites = reused(program)
        after = before.copy()
        grown = widen_values(after, sites[1:], 2)
        assert grown[path] == 16 * 16
        assert reads(after)[path].shape[axis] == 32
        for actual, expected in zip(after.module(ids), before.module(ids), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class NormedContext(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def join(self, y: torch.Tensor) -> torch.Tensor:
        return self.norm(super().join(y))


class Gated(Layer):
    def join(self, y: torch.Tensor) -> torch.Tensor:
        return super().join(y) * self.u

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(WIDTH))


class GatedValues(Gated):
    def operands(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = super().operands(x)
        return q, k, v * self.u.view(HEADS, 1, DIM)

    def join(self, y: torch.Tensor) -> torch.Tensor:
        return Layer.join(self, y)


class ReturnedValues(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.operands(x)
        return x + self.out(self.join(self.attend(q, k, v))) + v.sum()


class KeysReadElsewhere(Thirds):
    """The keys stay although the map does not need them: the weight is not only of values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.operands(x)
        return x + self.out(self.join(self.attend(q, k, v))) * k.mean()


REFUSED = {
    NormedContext: "normalises channels",
    Gated: "comes between its heads and the projection that reads them",
    GatedValues: "comes between its projection and its heads",
    ReturnedValues: "readers, one is expected|is also read by",
    KeysReadElsewhere: r"layers\.1\.qkv\.weight is not only of its values",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_else_has_that_width_is_named(kind: Callable[..., nn.Module]) -> None:
    program, sites = reused(exported(Encoder(kind, 2), torch.randn(3, 5, WIDTH)))
    with pytest.raises(fxreuse.UnsupportedError, match=rf"layers\.1: .*({REFUSED[kind]})"):
        widen_values(program, sites[1:], 2)


class Called(nn.Module):
    """One layer for all, as ALBERT has it; ``once`` is a layer of its own in front."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.layer = FusedOperator()
        self.first = FusedOperator() if first else self.layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(self.first(x)))


def test_a_shared_module_is_widened_if_all_its_calls_are() -> None:
    x = torch.randn(3, 5, WIDTH).double()
    program = exported(Called(first=True).double(), x)
    sites = find(program)
    expected = program.module(x)
    with pytest.raises(fxreuse.UnsupportedError, match=r"layer@1: .*layer\.v\.weight is also read by linear"):
        widen_values(program.copy(), sites[2:], 2)
    after = program.copy()
    grown = widen_values(after, sites[1:], 2)
    assert grown == {
        "layer.v.weight": WIDTH * WIDTH, "layer.v.bias": WIDTH, "layer.out.weight": WIDTH * WIDTH
    }  # fmt: skip
    torch.testing.assert_close(after.module(x), expected, rtol=1e-12, atol=1e-12)
    assert_values_known(after)


def test_tied_weights_are_not_widened() -> None:
    model = Encoder(Layer)
    model.layers[2].v.weight = model.layers[1].v.weight
    program, sites = reused(exported(model, torch.randn(3, 5, WIDTH)))
    with pytest.raises(fxreuse.UnsupportedError, match=r"one parameter|is also read by"):
        widen_values(program, sites[2:], 2)


def test_fewer_than_one_value_is_no_plan() -> None:
    program, sites = reused(double(Layer))
    with pytest.raises(fxreuse.PlanError, match="values=0"):
        widen_values(program, sites[1:], 0)
