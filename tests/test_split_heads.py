"""Another number of heads: equal to the same class built with that many, values and gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxreuse
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program
from fxreuse.passes.split_heads import split_heads
from fxreuse.program import Program
from fxreuse.tree import reads

from .handwritten import exported
from .meta_values import assert_values_known

WIDTH, HEADS = 16, 4
TOKENS = (3, 5, WIDTH)
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Layer(nn.Module):
    """Attention with projections of their own; subclasses write the parts in their own way."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, WIDTH // heads
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def operands(self, x: torch.Tensor) -> Operands:
        return self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.mT / math.sqrt(self.dim)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.scores(q, k).softmax(-1) @ v

    def join(self, y: torch.Tensor) -> torch.Tensor:
        return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], self.heads * self.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(self.join(self.attend(*self.operands(x))))


class FusedOperator(Layer):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class FusedWithScale(Layer):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=self.dim**-0.5)


class ScaledQueries(Layer):
    def operands(self, x: torch.Tensor) -> Operands:
        q, k, v = super().operands(x)
        return q * self.dim**-0.5, k, v

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.mT


class ScaledTwice(ScaledQueries):
    """The root of the factor on queries and on keys."""

    def operands(self, x: torch.Tensor) -> Operands:
        q, k, v = Layer.operands(self, x)
        return q * self.dim**-0.25, k * self.dim**-0.25, v


class Unscaled(Layer):
    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.mT


class Capped(Layer):
    """Scores capped by tanh: the cap is no scale."""

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return 5.0 * torch.tanh(super().scores(q, k) / 5.0)


class Thirds(Layer):
    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        del self.q, self.k, self.v

    def operands(self, x: torch.Tensor) -> Operands:
        q, k, v = self.qkv(x).split([WIDTH] * 3, -1)
        return self.split(q), self.split(k), self.split(v)


class Unbound(Thirds):
    def operands(self, x: torch.Tensor) -> Operands:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class Interleaved(Thirds):
    def operands(self, x: torch.Tensor) -> Operands:
        y = self.qkv(x).view(*x.shape[:2], self.heads, 3 * self.dim).transpose(1, 2)
        return y[..., : self.dim], y.narrow(-1, self.dim, self.dim), y.split(self.dim, -1)[2]


class Transposed(Layer):
    """GPT-2's weights."""

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.w, self.b = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH)), nn.Parameter(torch.randn(3 * WIDTH))
        del self.q, self.k, self.v

    def operands(self, x: torch.Tensor) -> Operands:
        y = torch.addmm(self.b, x.view(-1, WIDTH), self.w).view(*x.shape[:2], 3 * WIDTH)
        q, k, v = (self.split(part) for part in y.chunk(3, -1))
        return q, k, v


class ByBmm(Layer):
    """Heads and batch in one axis, under a mask that is expanded to the heads."""

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return super().split(x).reshape(x.shape[0] * self.heads, x.shape[1], -1)

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        batch, length = q.shape[0] // self.heads, q.shape[1]
        mask = torch.full((length, length), -9.0).to(q).triu(1).expand(batch, self.heads, length, length)
        return super().scores(q, k) + mask.reshape(batch * self.heads, length, length)

    def join(self, y: torch.Tensor) -> torch.Tensor:
        return super().join(y.view(-1, self.heads, *y.shape[1:]))


class ByEinsum(Layer):
    """Weights with axes of heads and of channels, and weak attention suppression."""

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(WIDTH, heads, self.dim) / 4) for _ in range(3))
        self.wo = nn.Parameter(torch.randn(heads, self.dim, WIDTH) / 4)
        del self.q, self.k, self.v, self.out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.einsum("btc,chd->bthd", x, w) for w in (self.wq, self.wk, self.wv))
        probs = (torch.einsum("bqhd,bkhd->bhqk", q, k) * self.dim**-0.5).softmax(-1)
        weak = probs.mean(-1, keepdim=True) - 0.5 * probs.std(-1, keepdim=True)
        probs = probs.masked_fill(probs < weak, 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
        return x + torch.einsum("bqhd,hdc->bqc", torch.einsum("bhqk,bkhd->bqhd", probs, v), self.wo)


class Relative(Layer):
    """A Conformer's: u, v, a projection of positions, and the relative shift by a column of zeros."""

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.pos = nn.Linear(WIDTH, WIDTH, bias=False)
        self.u, self.w = nn.Parameter(torch.randn(heads, self.dim)), nn.Parameter(torch.randn(heads, self.dim))

    def operands(self, x: torch.Tensor) -> Operands:
        q, k, v = (p(x).view(*x.shape[:2], self.heads, self.dim) for p in (self.q, self.k, self.v))
        return q, k.transpose(1, 2), v.transpose(1, 2)

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        batch, length = q.shape[:2]
        table = torch.arange(2 * length - 1).to(q)[:, None] * torch.linspace(0, 1, WIDTH).to(q)
        p = self.pos(table.sin()).view(1, -1, self.heads, self.dim).transpose(1, 2)
        distance = (q + self.w).transpose(1, 2) @ p.mT
        padded = torch.cat([torch.zeros(batch, self.heads, length, 1).to(q), distance], -1)
        shifted = padded.view(batch, self.heads, 2 * length, length)[:, :, 1:].reshape(distance.shape)[..., :length]
        return ((q + self.u).transpose(1, 2) @ k.mT + shifted) / math.sqrt(self.dim)


class RelativeFused(Relative):
    """The same with positions in the mask of a fused operator, and with padding."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, length = q.shape[:2]
        p = self.pos(torch.linspace(0, 1, WIDTH).to(q).expand(2 * length - 1, -1)).view(-1, self.heads, self.dim)
        shifted = F.pad((q + self.w).transpose(1, 2) @ p.permute(1, 2, 0), (1, 0))
        shifted = shifted.view(batch, self.heads, 2 * length, length)[:, :, 1:]
        shifted = shifted.reshape(batch, self.heads, length, 2 * length - 1)[..., :length] / math.sqrt(self.dim)
        return F.scaled_dot_product_attention((q + self.u).transpose(1, 2), k, v, attn_mask=shifted)


class MultiHead(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, heads, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x, x, x, need_weights=False)[0]


class Encoder(nn.Module):
    def __init__(self, layer: Callable[[int], nn.Module], *heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(count) for count in heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def rebuilt(model: nn.Module, other: nn.Module) -> nn.Module:
    """The other model with the parameters of the first, in its own shapes."""
    own = other.double().state_dict()
    other.load_state_dict({path: value.reshape(own[path].shape) for path, value in model.state_dict().items()})
    return other.eval()


def assert_as_built(program: Program, model: nn.Module, *inputs: torch.Tensor) -> None:
    """Equal values, and equal gradients of every parameter."""
    expected = model(*inputs)
    expected = expected if isinstance(expected, torch.Tensor) else expected[0]
    actual = program.module(*inputs)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    own = {path: value for path, value in reads(program).items() if isinstance(value, nn.Parameter)}
    wanted = dict(model.named_parameters())
    assert own
    found = torch.autograd.grad(actual.square().sum(), list(own.values()), allow_unused=True)
    known = torch.autograd.grad(expected.square().sum(), [wanted[path] for path in own], allow_unused=True)
    for path, gradient, right in zip(own, found, known, strict=True):
        assert own[path].shape == wanted[path].shape, path
        if gradient is not None:
            torch.testing.assert_close(gradient, right, rtol=1e-9, atol=1e-10, msg=lambda text, p=path: f"{p}: {text}")


KINDS = (
    Layer, FusedOperator, FusedWithScale, ScaledQueries, ScaledTwice, Unscaled, Capped, Thirds, Unbound, Interleaved,
    Transposed, ByBmm, ByEinsum, Relative, RelativeFused, MultiHead,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_as_the_class_with_other_heads(kind: Callable[[int], nn.Module]) -> None:
    """The last layer keeps its heads."""
    model = Encoder(kind, HEADS, HEADS).double().eval()
    program = exported(model, torch.randn(TOKENS).double())
    before = {path: (id(value), value.shape) for path, value in reads(program).items()}
    sites = find(program)
    for heads in (2, 8):
        after = split_heads(program, sites[:1], heads)
        assert [site.heads for site in find(after)] == [heads, HEADS]
        if heads == 2:
            assert_values_known(after)
        other = rebuilt(model, Encoder(kind, heads, HEADS))
        for shape in (TOKENS, (2, 7, WIDTH)):
            assert_as_built(after, other, torch.randn(shape).double())
    assert {path: (id(value), value.shape) for path, value in reads(program).items()} == before


def test_public_models() -> None:
    hf = pytest.importorskip("transformers")

    def sizes(heads: int) -> dict[str, int]:
        return {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": heads, "intermediate_size": 32}

    convolutions = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
    speech = {**convolutions, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0}
    conformer = {**speech, "position_embeddings_type": "relative", "conv_depthwise_kernel_size": 3}
    models: list[tuple[Callable[[int], nn.Module], torch.Tensor]] = [
        (lambda h: hf.BertModel(hf.BertConfig(vocab_size=50, **sizes(h))), torch.randint(3, 50, (2, 7))),
        (lambda h: hf.ViTModel(hf.ViTConfig(image_size=16, patch_size=8, **sizes(h))), torch.randn(2, 3, 16, 16)),
        (lambda h: hf.HubertModel(hf.HubertConfig(**speech, **sizes(h))), torch.randn(2, 130)),
        (lambda h: hf.Wav2Vec2ConformerModel(hf.Wav2Vec2ConformerConfig(**conformer, **sizes(h))), torch.randn(2, 130)),
    ]
    for build, x in models:
        x = x.double() if x.is_floating_point() else x
        model = build(4).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            model(x)  # tables of positions are made at the first call
        program = load_program(torch.export.export(model, (x,), strict=False))
        other = rebuilt(model, build(2))
        with torch.no_grad():
            other(x)
        assert_as_built(split_heads(program, list(find(program)), 2), other, x)


@functools.cache
def one_layer() -> Program:
    return exported(Encoder(Layer, HEADS), torch.randn(TOKENS))


def test_as_many_heads_as_there_are_change_nothing() -> None:
    program = one_layer()
    assert split_heads(program, list(find(program)), HEADS) is program


class Table(Layer):
    """T5's and Swin's: a bias for every head and distance."""

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.table = nn.Embedding(32, heads)

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        at = torch.arange(q.shape[2])
        return super().scores(q, k) + self.table((at[:, None] - at).clamp(-9, 9) + 9).permute(2, 0, 1)[None]


class Alibi(Layer):
    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, heads + 1))

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        at = torch.arange(q.shape[2])
        return super().scores(q, k) - (at[:, None] - at).abs() * self.slopes[:, None, None]


class Rotary(Layer):
    def operands(self, x: torch.Tensor) -> Operands:
        q, k, v = super().operands(x)
        angles = torch.arange(x.shape[1])[:, None] / 10.0 ** torch.arange(0, self.dim, 2)
        cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()

        def turned(y: torch.Tensor) -> torch.Tensor:
            return y * cos + torch.cat((-y[..., self.dim // 2 :], y[..., : self.dim // 2]), -1) * sin

        return turned(q), turned(k), v


class Normed(Layer):
    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.norm = nn.LayerNorm(self.dim)

    def operands(self, x: torch.Tensor) -> Operands:
        q, k, v = super().operands(x)
        return self.norm(q), self.norm(k), v


class NormedByHand(Normed):
    def operands(self, x: torch.Tensor) -> Operands:
        q, k, v = Layer.operands(self, x)
        return q * q.square().mean(-1, keepdim=True).rsqrt() * self.norm.weight, k, v


class OddScale(Layer):
    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.mT * 0.3


class TensorScale(Layer):
    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.register_buffer("scale", torch.tensor(self.dim**-0.5))

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.mT * self.scale


class Temperature(Layer):
    """One for every head."""

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return super().scores(q, k) * self.temperature


REFUSED = {
    Table: r"made of layers\.1\.table\.weight, has an axis of heads and none of channels",
    Alibi: "has an axis of heads and none of channels",
    Rotary: "rotary embeddings of a fixed width",
    Normed: "normalises the channels of a head",
    NormedByHand: "has an axis of the channels of one head and none of heads",
    OddScale: r"multiplies by 0\.3, which is not 1/√4",
    TensorScale: "multiplies by a tensor of one element",
    Temperature: "temperature.* has an axis of heads and none of channels",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_the_reason_is_named(kind: Callable[[int], nn.Module]) -> None:
    program = exported(Encoder(kind, HEADS, HEADS), torch.randn(TOKENS))
    with pytest.raises(fxreuse.UnsupportedError, match=rf"layers\.1 .*{REFUSED[kind]}"):
        split_heads(program, find(program)[1:], 2)


class Grouped(Layer):
    """Two heads of queries share one of keys and values."""

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.k, self.v = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH // 2)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], -1, self.dim).transpose(1, 2)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class GroupedByHand(Grouped):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (y[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for y in (k, v))
        return Layer.attend(self, q, k, v)


@pytest.mark.parametrize("kind", [Grouped, GroupedByHand], ids=lambda kind: kind.__name__)
def test_grouped_heads_stay_grouped(kind: Callable[[int], nn.Module]) -> None:
    model = Encoder(kind, HEADS).double().eval()
    x = torch.randn(TOKENS).double()
    program = exported(model, x)
    after = split_heads(program, list(find(program)), 2)
    assert (find(after)[0].heads, find(after)[0].kv_heads) == (2, 1)
    assert_as_built(after, rebuilt(model, Encoder(kind, 2)), x)
    with pytest.raises(fxreuse.PlanError, match="4 of queries share 2 of keys and values"):
        split_heads(program, list(find(program)), 1)


@pytest.mark.parametrize("heads", [0, 3, 32])
def test_heads_that_do_not_divide_the_width(heads: int) -> None:
    program = one_layer()
    with pytest.raises(fxreuse.PlanError, match=rf"cannot have {heads} heads: .*4 × 4 = 16 channels"):
        split_heads(program, list(find(program)), heads)


class Called(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.layer = Relative(heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(x))


def test_a_shared_module_is_split_in_all_its_calls_or_in_none() -> None:
    """Its u and v have one shape."""
    model = Called(HEADS).double().eval()
    x = torch.randn(TOKENS).double()
    program = exported(model, x)
    sites = list(find(program))
    assert_as_built(split_heads(program, sites, 2), rebuilt(model, Called(2)), x)
    with pytest.raises(fxreuse.UnsupportedError, match=r"is also read in layer@1, which keeps its heads"):
        split_heads(program, sites[:1], 2)
