"""Wider feed-forward layers: found by data flow, the same function, able to learn, and as wide as the plan says."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxreuse
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program
from fxreuse.layouts.feed_forward import find_feed_forward
from fxreuse.passes.lay_reuse import lay_reuse
from fxreuse.plans.plan import Plan

from .running import apply_captured, gradients

WIDTH, INNER = 8, 12
X = torch.randn(3, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Conv1D(nn.Module):
    """A projection as GPT-2 writes it: weight inputs × outputs, tokens flattened."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 8)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        shape = (*x.shape[:-1], self.bias.shape[0])
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(shape)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.down(self.dropout(F.gelu(self.up(x)) * 0.5))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Halves(Plain):
    """A gate and its values from one projection; ``split`` is how they are told apart."""

    split: str

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * INNER)

    def forward(self, x):
        if self.split == "glu":
            return self.down(F.glu(self.up(x)))
        halves = {
            "chunk": lambda h: h.chunk(2, dim=-1),
            "split": lambda h: h.split(INNER, dim=-1),
            "sizes": lambda h: h.split([INNER, INNER], dim=-1),
        }
        gate, values = halves[self.split](self.up(x))
        return self.down(F.silu(gate) * values)


class ByHand(nn.Module):
    """Products with parameters, the biases added on their own."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.rand(WIDTH, INNER) / 8), nn.Parameter(torch.rand(WIDTH, INNER) / 8)
        self.b1, self.b2 = nn.Parameter(torch.randn(INNER)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return torch.tanh(x @ self.w1 + self.b1) @ self.w2.T + self.b2


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Conv1D(WIDTH, INNER), Conv1D(INNER, WIDTH)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class WithAdapter(Plain):
    """A feed-forward layer and, behind it, a bottleneck of the same form."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Sequential(nn.Linear(WIDTH, 2), nn.GELU(), nn.Linear(2, WIDTH))

    def forward(self, x):
        return self.adapter(super().forward(x))


class Two(nn.Module):
    """Two of one width, as in a Conformer, and a gated convolution of one tap between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Plain(), Gated()
        self.widen, self.narrow = nn.Conv1d(WIDTH, 2 * WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x):
        x = x + 0.5 * self.first(x)
        x = x + self.narrow(F.glu(self.widen(x.transpose(1, 2)), dim=1)).transpose(1, 2)
        return x + 0.5 * self.second(x)


class Normed(Plain):
    """A norm over the inner units, which new ones would change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(INNER)

    def forward(self, x):
        return self.down(self.norm(F.gelu(self.up(x))))


class Seen(Plain):
    """Somebody else reads the inner units."""

    def forward(self, x):
        h = F.gelu(self.up(x))
        return self.down(h) + h.mean(-1, keepdim=True)


class Tied(Plain):
    """A weight that is read a second time, outside of the feed-forward layer."""

    def forward(self, x):
        return super().forward(x) + x @ (self.up.weight.T @ self.up.weight)


class Layer(nn.Module):
    def __init__(self, feed_forward: nn.Module) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.feed_forward = feed_forward

    def forward(self, x):
        query, key, value = (
            projection(x).unflatten(-1, (2, -1)).transpose(1, 2) for projection in (self.query, self.key, self.value)
        )
        context = F.scaled_dot_product_attention(query, key, value)
        x = x + self.output(context.transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)


class Model(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], layers: int = 2, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared
        made = [Layer(make()) for _ in range(1 if shared else layers)]
        self.layers, self.count = nn.ModuleList(made), layers

    def forward(self, x):
        for i in range(self.count):
            x = self.layers[0 if self.shared else i](x)
        return x


def halves(split: str) -> Callable[[], nn.Module]:
    return type(f"Halves_{split}", (Halves,), {"split": split})


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# How a feed-forward layer is written, and the number of parameters of one unit of its width.
FORMS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain": (Plain, 2 * WIDTH + 1),
    "gated": (Gated, 3 * WIDTH + 1),
    "glu": (halves("glu"), 3 * WIDTH + 2),
    "chunk": (halves("chunk"), 3 * WIDTH + 2),
    "split": (halves("split"), 3 * WIDTH + 2),
    "split by sizes": (halves("sizes"), 3 * WIDTH + 2),
    "by hand": (ByHand, 2 * WIDTH + 1),
    "weight transposed": (Gpt, 2 * WIDTH + 1),
    "with an adapter": (WithAdapter, 2 * WIDTH + 1),
    "two": (Two, 5 * WIDTH + 2),
}


class AllForms(nn.Module):
    """A layer of every form."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(make()) for make, _ in FORMS.values())

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def widened() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = AllForms().double().eval()
    return model, fxreuse.apply(model, "1x* ffn=17", X)


def test_the_function_stays(widened):
    model, wide = widened
    torch.testing.assert_close(wide(X), model(X), rtol=0, atol=1e-12)
    record = fxreuse.describe(wide)
    wanted = gradients(model, model(X))
    for name, gradient in gradients(wide, wide(X)).items():
        if name not in record.added:
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-10)
    assert record.parameters_removed == 0
    assert record.parameters_added == count(wide) - count(model)
    assert sorted(path for one in record.decisions for path in one.added) == sorted(record.added)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gets_five_units_more(widened, form):
    record = fxreuse.describe(widened[1])
    decision = record.decisions[list(FORMS).index(form)]
    assert sum(record.added[path] for path in decision.added) == 5 * FORMS[form][1]
    assert {path.split(".")[1] for path in decision.added} == {str(decision.layer)}


def test_what_is_new_learns(widened):
    model, wide = widened[0], copy.deepcopy(widened[1])
    optimizer = torch.optim.SGD(wide.parameters(), 0.05)
    before = {name: parameter.detach().clone() for name, parameter in wide.named_parameters()}
    for _ in range(2):  # columns first, then rows
        optimizer.zero_grad()
        wide(X).square().mean().backward()
        optimizer.step()
    for name in fxreuse.describe(wide).added:
        old, new = dict(model.named_parameters())[name], dict(wide.named_parameters())[name]
        [axis] = [i for i, (a, b) in enumerate(zip(old.shape, new.shape, strict=True)) if a != b]
        change = (new - before[name]).abs().movedim(axis, 0).reshape(new.shape[axis], -1).amax(1)
        assert change.count_nonzero() > old.shape[axis], f"{name} does not learn"


@pytest.fixture(scope="module")
def plain() -> tuple[nn.Module, nn.Module]:
    model = Model(Plain).eval()
    return model, fxreuse.apply(model, "1x* ffn=17", X.float())


def test_new_columns_are_zero_and_new_rows_are_not(plain):
    model, wide = plain[0], dict(plain[1].named_parameters())
    rows, columns = wide["layers.1.feed_forward.up.weight"], wide["layers.1.feed_forward.down.weight"]
    assert torch.equal(rows[:INNER], model.layers[1].feed_forward.up.weight)
    assert rows[INNER:].std() > 0.1
    assert rows.abs().max() <= WIDTH**-0.5  # as torch.nn.Linear draws them
    assert torch.equal(columns[:, INNER:], torch.zeros(WIDTH, 5))
    assert wide["layers.1.feed_forward.down.bias"] is model.layers[1].feed_forward.down.bias


def test_modules_know_their_sizes(plain):
    wide = plain[1]
    up, down = wide.get_submodule("layers.0.feed_forward.up"), wide.get_submodule("layers.0.feed_forward.down")
    assert (up.out_features, down.in_features) == (17, 17)
    assert isinstance(up, nn.Linear)


def test_shared_layers_are_widened_once():
    model = Model(Plain, layers=3, shared=True).double().eval()
    program = load_program(model, X)
    wide = apply_captured(model, program, "3x* ffn=17")
    record = fxreuse.describe(wide)
    assert record.parameters_added == 5 * FORMS["plain"][1]
    assert count(wide) == count(model) + record.parameters_added - record.parameters_removed
    same = apply_captured(model, program, "1x* ffn=17")
    torch.testing.assert_close(same(X), model(X), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["plain", "two"])
def test_match(form):
    make, unit = FORMS[form]
    program = load_program(Model(make, layers=3).eval(), X.float())
    sites = find(program)

    @functools.cache
    def size(plan):
        step = Plan.parse(plan).passes[0]
        done = lay_reuse(program, sites, step.groups.leaders(3), step)
        parameters = sum(parameter.numel() for parameter in done.program.parameters().values())
        assert sum(done.added.values()) - sum(done.removed.values()) == parameters - size_before
        return parameters

    size_before = sum(parameter.numel() for parameter in program.parameters().values())
    for plan, target in (("3x1", size_before), ("2x*", size_before), ("3x1", size("2x*"))):
        aim = "" if target == size_before else ":2x*"
        found, without = size(f"{plan} ffn=match{aim}"), size(plan)
        assert 0 <= target - found < 3 * unit
        assert (found - without) % (3 * unit) == 0


def test_a_model_without_weights():
    with torch.device("meta"):
        model = Model(Plain).eval()
    wide = fxreuse.apply(model, "2x1 ffn=match", X.float().to("meta"))
    assert {parameter.device.type for parameter in wide.parameters()} == {"meta"}
    assert count(model) - FORMS["plain"][1] * 2 < count(wide) <= count(model)
    real = wide.to_empty(device="cpu")
    for module in real.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    assert real(X.float()).isfinite().all()


@pytest.mark.parametrize("make", [Normed, Seen], ids=lambda make: make.__name__)
def test_what_new_units_would_change_is_no_feed_forward_layer(make):
    with pytest.raises(fxreuse.UnsupportedError, match=r"no feed-forward layer was found in layers\.0: it takes a pro"):
        fxreuse.apply(Model(make).eval(), "1x* ffn=17", X.float())


def test_a_weight_that_is_read_elsewhere_is_left_alone():
    with pytest.raises(
        fxreuse.UnsupportedError, match=r"layers\.0 cannot be made wider: its layers\.0.*up\.weight is al"
    ):
        fxreuse.apply(Model(Tied).eval(), "1x* ffn=17", X.float())


def test_tied_weights_of_two_modules_are_left_alone():
    model = Model(Plain).eval()
    model.layers[1].feed_forward.up.weight = model.layers[0].feed_forward.up.weight
    with pytest.raises(fxreuse.UnsupportedError, match=r"up\.weight is also read by"):
        fxreuse.apply(model, "1x* ffn=17", X.float())


def test_widths_that_cannot_be():
    model = Model(Plain, layers=4).eval()
    program = load_program(model, X.float())
    with pytest.raises(
        fxreuse.PlanError, match=r"ffn=8 is narrower than the feed-forward layer of layers\.0, .* width 12"
    ):
        apply_captured(model, program, "2x2 ffn=8")
    with pytest.raises(fxreuse.PlanError, match=r"has 144 parameters more than under 4x1; leave ffn= out"):
        apply_captured(model, program, "2x2 ffn=match:4x1")


def test_found_by_data_flow():
    program = load_program(Model(Two).eval(), X.float())
    found = find_feed_forward(program, [site.layer_path for site in find(program)])
    assert [(one.layer, one.width, len(one.ups)) for one in found] == [
        ("layers.0", INNER, 1),
        ("layers.0", INNER, 2),
        ("layers.1", INNER, 1),
        ("layers.1", INNER, 2),
    ]
