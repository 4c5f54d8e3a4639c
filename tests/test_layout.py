"""Which weight row feeds which (head, channel): inferred, against what perturbing the rows shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxreuse
from fxreuse.attention import AttentionSite
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program
from fxreuse.layouts.layout import WeightLayout, key_layout, output_layout, query_layout, value_layout
from fxreuse.program import Program

from .handwritten import Attention, find_in

Step = Callable[[torch.Tensor], torch.Tensor]
LAYOUTS = (query_layout, key_layout, value_layout)


class Chain:
    """Steps on a tensor whose axes are known by name, drawn one after another."""

    def __init__(self, draw: st.DrawFn, axes: list[str]) -> None:
        self.draw, self.axes, self.steps = draw, axes, []

    def then(self, step: Step, axes: list[str]) -> None:
        self.steps.append(step)
        self.axes = axes

    def permute(self, axes: list[str]) -> None:
        order = [self.axes.index(axis) for axis in axes]
        self.then(lambda x: x.permute(order), axes)

    def disturb(self) -> None:
        """Steps that leave every element in its place, as a whole or by name."""
        for _ in range(self.draw(st.integers(0, 2))):
            place = self.draw(st.integers(0, len(self.axes) - 2))
            match self.draw(st.sampled_from(["permute", "transpose", "flatten", "unsqueeze", "copy", "elementwise"])):
                case "permute":
                    self.permute(list(self.draw(st.permutations(self.axes))))
                case "transpose":
                    axes = list(self.axes)
                    axes[place], axes[place + 1] = axes[place + 1], axes[place]
                    self.then(lambda x, i=place: x.transpose(i, i + 1), axes)
                case "flatten":
                    self.then(lambda x, i=place: x.flatten(i, i + 1).reshape(x.shape), self.axes)
                case "unsqueeze":
                    self.then(lambda x, i=place: x.unsqueeze(i).squeeze(i), self.axes)
                case "copy":
                    self.then(lambda x: x.contiguous().clone(), self.axes)
                case "elementwise":
                    self.then(lambda x: F.dropout(x.float() * 2, 0.1, False) / 2, self.axes)

    def take(self, index: int) -> None:
        """One of the three."""
        axis = self.axes.index("3")
        ways: dict[str, Step] = {
            "select": lambda x: x.select(axis, index),
            "unbind": lambda x: x.unbind(axis)[index],
            "chunk": lambda x: x.chunk(3, axis)[index].squeeze(axis),
            "split": lambda x: x.split([1, 1, 1], axis)[index].squeeze(axis),
            "narrow": lambda x: x.narrow(axis, index, 1).squeeze(axis),
        }
        self.then(ways[self.draw(st.sampled_from(sorted(ways)))], [a for a in self.axes if a != "3"])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = step(x)
        return x


@dataclasses.dataclass
class Drawn:
    """One attention: how it splits its projection, how it joins its heads, and whether it mixes tokens with rows."""

    heads: int
    dim: int
    factors: tuple[str, ...]
    operands: list[Chain]
    out: Chain
    flat: bool
    mixes: bool


@st.composite
def attentions(draw: st.DrawFn) -> Drawn:
    factors = draw(st.permutations(["3", "h", "d"]))
    operands = []
    for index in draw(st.permutations([0, 1, 2])):
        chain = Chain(draw, ["b", "t", *factors])
        chain.disturb()
        chain.take(index)
        chain.disturb()
        chain.permute(["b", "h", "t", "d"])
        operands.append(chain)
    out = Chain(draw, ["b", "h", "t", "d"])
    out.disturb()
    out.permute([*draw(st.permutations(["b", "t"])), *draw(st.permutations(["h", "d"]))])
    heads, dim = draw(st.integers(2, 3)), draw(st.integers(2, 3))
    mixes = draw(st.integers(0, 5)) == 0
    return Drawn(heads, dim, tuple(factors), operands, out, draw(st.booleans()), mixes)


class Fused(nn.Module):
    """Attention over one projection, written as it was drawn."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.drawn = drawn
        width = drawn.heads * drawn.dim
        self.qkv, self.out = nn.Linear(8, 3 * width), nn.Linear(width, 8)

    def operand(self, y: torch.Tensor, which: int) -> torch.Tensor:
        if self.drawn.mixes:
            y = y.transpose(1, 2).reshape(y.shape)
        sizes = {"3": 3, "h": self.drawn.heads, "d": self.drawn.dim}
        return self.drawn.operands[which](y.view(*y.shape[:2], *(sizes[factor] for factor in self.drawn.factors)))

    def joined(self, context: torch.Tensor) -> torch.Tensor:
        x = self.drawn.out(context).flatten(2)
        return x.flatten(0, 1) if self.drawn.flat else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.operand(self.qkv(x), which) for which in range(3))
        joined = self.joined((q @ k.mT).softmax(-1) @ v)
        axes = self.drawn.out.axes
        y = self.out(joined).view(*(x.shape[:2] if axes.index("b") == 0 else x.shape[1::-1]), 8)
        return x + (y if axes.index("b") == 0 else y.transpose(0, 1))


class Several(nn.Module):
    def __init__(self, drawn: list[Drawn]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Fused(one) for one in drawn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def rows_by_perturbing(layer: Fused, which: int) -> torch.Tensor:
    """For every (head, channel) the one row that changes it, by changing one row after another."""
    rows = torch.full((layer.drawn.heads, layer.drawn.dim), -1)
    for row, one in enumerate(torch.eye(layer.qkv.out_features)):
        changed = layer.operand(one.expand(3, 5, -1), which)[1, :, 2] != 0
        rows[changed] = row
    return rows


def columns_by_perturbing(layer: Fused) -> torch.Tensor:
    columns = torch.empty(layer.drawn.heads, layer.drawn.dim, dtype=torch.long)
    for head in range(layer.drawn.heads):
        for channel in range(layer.drawn.dim):
            context = torch.zeros(3, layer.drawn.heads, 5, layer.drawn.dim)
            context[:, head, :, channel] = 1
            (columns[head, channel],) = layer.joined(context).flatten(0, -2)[0].nonzero().flatten()
    return columns


@hypothesis.settings(max_examples=max(3, hypothesis.settings.default.max_examples // 20))
@hypothesis.given(st.lists(attentions(), min_size=3, max_size=4))
def test_rows_are_those_that_perturbing_shows(drawn: list[Drawn]) -> None:
    model = Several(drawn).eval()
    free = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    program = load_program(torch.export.export(model, (torch.randn(3, 5, 8),), dynamic_shapes=free))
    sites = {site.layer: site for site in find(program)}
    for number, layer in enumerate(model.layers):
        for which, infer in enumerate(LAYOUTS):
            if layer.drawn.mixes:
                with pytest.raises(fxreuse.UnsupportedError, match="mixes tokens and channels"):
                    infer(program, sites[number])
                continue
            found = infer(program, sites[number])
            assert (found.weight, found.bias, found.axis) == (f"layers.{number}.qkv.weight", found.bias, 0)
            assert found.bias == f"layers.{number}.qkv.bias"
            assert torch.equal(found.rows, rows_by_perturbing(layer, which)), (layer.drawn.factors, infer.__name__)
        found = output_layout(program, sites[number])
        assert (found.weight, found.bias, found.axis) == (f"layers.{number}.out.weight", None, 1)
        assert torch.equal(found.rows, columns_by_perturbing(layer))


def test_layouts_of_public_models() -> None:
    hf = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1}
    inner = {"intermediate_size": 32, "use_cache": False}
    bloom = hf.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=4, use_cache=False)
    dense, interleaved = torch.arange(16).reshape(4, 4), torch.arange(48).reshape(4, 3, 4)[:, 2]
    models: dict[nn.Module, tuple[str, torch.Tensor]] = {
        hf.BertModel(hf.BertConfig(**sizes, **inner)): ("encoder.layer.0.attention.self.value", dense),
        hf.GPTNeoXModel(hf.GPTNeoXConfig(**sizes, **inner)): ("layers.0.attention.query_key_value", interleaved),
        hf.BloomModel(bloom): ("h.0.self_attention.query_key_value", interleaved),
        hf.LlamaModel(hf.LlamaConfig(**sizes, **inner, num_key_value_heads=2)): (
            "layers.0.self_attn.v_proj",
            dense[:2],
        ),
    }
    for model, (path, rows) in models.items():
        program = load_program(torch.export.export(model.eval(), (torch.randint(3, 50, (2, 7)),), strict=False))
        (site,) = find(program)
        found = value_layout(program, site)
        assert (found.weight, found.axis, found.rows.tolist()) == (f"{path}.weight", 0, rows.tolist())
        out = output_layout(program, site)
        assert (out.axis, out.rows.tolist()) == (1, dense.tolist())


class ByBmm(Attention):
    """Heads and batch in one axis; the projections multiply by Parameters, biases are added on their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 24)), nn.Parameter(torch.randn(24))
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (x @ self.weight + self.bias).chunk(3, -1)
        q, k, v = (self.split(part).permute(2, 0, 1, 3).flatten(0, 1) for part in parts)
        y = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)
        return self.out(y.view(self.heads, *x.shape[:2], -1).permute(1, 2, 0, 3).flatten(2))


class Grouped(Attention):
    """Two heads of keys and values for four of queries, repeated by hand."""

    def __init__(self) -> None:
        super().__init__(heads=4)
        self.k, self.v, self.out = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.split(self.q(x)).transpose(1, 2)
        k, v = (p(x).view(*x.shape[:2], 2, 2).transpose(1, 2) for p in (self.k, self.v))
        k, v = (p[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for p in (k, v))
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Tiled(Grouped):
    """The heads of values in turns, and not each of them twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.split(self.q(x)).transpose(1, 2)
        k, v = (p(x).view(*x.shape[:2], 2, 2).transpose(1, 2).repeat(1, 2, 1, 1) for p in (self.k, self.v))
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Convolved(Attention):
    """Projections as convolutions over an image's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv2d(8, 24, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, 3, self.heads, 4, height * width).unbind(1)
        y = v @ (q.mT @ k).softmax(-1).mT
        return self.out(y.reshape(batch, 8, height, width))


class PackedCross(nn.Module):
    """torch.nn's own: one weight, cut before the product."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.inner(x, y.tanh(), y.tanh(), need_weights=False)[0]


TOKENS = (3, 5, 8)
LAST_THIRD = torch.arange(16, 24).reshape(2, 4)
HANDWRITTEN: dict[type[nn.Module], tuple[tuple[tuple[int, ...], ...], WeightLayout, int]] = {
    ByBmm: ((TOKENS,), WeightLayout("weight", "bias", 1, LAST_THIRD), 2),
    Grouped: ((TOKENS,), WeightLayout("v.weight", "v.bias", 0, torch.arange(4).reshape(2, 2)), 4),
    Tiled: ((TOKENS,), WeightLayout("v.weight", "v.bias", 0, torch.arange(4).reshape(2, 2)), 4),
    Convolved: (((3, 8, 2, 5),), WeightLayout("qkv.weight", "qkv.bias", 0, LAST_THIRD), 2),
    PackedCross: (
        (TOKENS, (3, 7, 8)),
        WeightLayout("inner.in_proj_weight", "inner.in_proj_bias", 0, LAST_THIRD),
        2,
    ),
}


@pytest.mark.parametrize("module", HANDWRITTEN)
def test_layouts_of_handwritten_modules(module: type[nn.Module]) -> None:
    shapes, expected, heads = HANDWRITTEN[module]
    program, (site,) = find_in(module(), *shapes)
    found = value_layout(program, site)
    assert dataclasses.replace(found, rows=expected.rows) == expected
    assert torch.equal(found.rows, expected.rows)
    out = output_layout(program, site)
    assert out.rows.tolist() == torch.arange(8).reshape(heads, -1).tolist()


class Refused(Attention):
    def values(self, x: torch.Tensor) -> torch.Tensor:
        return self.v(x)

    def after(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def __init__(self) -> None:
        super().__init__()
        self.out, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(p(x)).transpose(1, 2) for p in (self.q, self.k, self.values))
        return self.out(self.after(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)))


class NormedValues(Refused):
    def values(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.v(x))


class RotatedValues(Refused):
    def values(self, x: torch.Tensor) -> torch.Tensor:
        v = self.v(x)
        return v * x.cos() + torch.cat((-v[..., 4:], v[..., :4]), -1) * x.sin()


class PlainValues(Refused):
    def values(self, x: torch.Tensor) -> torch.Tensor:
        return x


class TwoProjections(Refused):
    def values(self, x: torch.Tensor) -> torch.Tensor:
        return self.v(x) + self.out(x)


class NormedContext(Refused):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        return self.norm(y)


class ReadTwice(Refused):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        return self.q(y) * y


class Residual(Refused):
    """What the last projection reads are not the channels of the attention alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(p(x)).transpose(1, 2) for p in (self.q, self.k, self.values))
        return self.out(x + ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class ReadElsewhere(Refused):
    """The channels go into a projection and, as they are, to what the model returns."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        q, k, v = (self.split(p(x)).transpose(1, 2) for p in (self.q, self.k, self.values))
        context = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.out(context), context.relu()


@pytest.mark.parametrize(
    ("module", "infer", "reason"),
    [
        (NormedValues, value_layout, "normalises channels"),
        (RotatedValues, value_layout, "combines channels with one another"),
        (PlainValues, value_layout, "x .* is an input of the model, and not projected"),
        (TwoProjections, value_layout, "combines several projections"),
        (NormedContext, output_layout, "normalises channels"),
        (ReadTwice, output_layout, "is read by 2 projections"),
        (Residual, output_layout, "add.* as a residual connection does"),
        (ReadElsewhere, output_layout, "relu.* is neither a move nor elementwise"),
    ],
)
def test_the_reason_is_named(module: type[nn.Module], infer: Callable[..., WeightLayout], reason: str) -> None:
    program: Program
    site: AttentionSite
    program, (site,) = find_in(module())
    with pytest.raises(fxreuse.UnsupportedError, match=reason):
        infer(program, site)
