"""Sharing weights between layers, and residuals on top: sizes, values, gradients, storage, refusals."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxreuse
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program
from fxreuse.weights.block import find_block

from .running import assert_same
from .shared_weights import NAMES, SPECS, applied, captured, gradients, meaning, size

EXACT = 1e-12


def expected_size(name: str, groups: int, rank: int, diagonal: bool, own_biases: bool) -> int:
    """Parameters of the projections, from the paper's formulas for each matrix."""
    spec = SPECS["thirds" if name == "transposed" else name]
    width, kv = spec.width, spec.kv_heads * spec.head_dim
    shapes = [(width, width), (width, kv), (width, kv), (width, width), (width, 10), (10, width)]
    biases = sum(outputs for _, outputs in shapes[:4]) * spec.bias + 10 + width
    weights = sum(inputs * outputs for inputs, outputs in shapes)
    residual = sum(min(rank, *shape) * sum(shape) + diagonal * min(shape) for shape in shapes) if rank else 0
    return groups * weights + (spec.layers if own_biases else groups) * biases + spec.layers * residual


def in_projections(model: torch.nn.Module) -> int:
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    return size(model) - norms


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, int, int, bool, str]:
    name = draw(st.sampled_from(NAMES))
    layers = SPECS["thirds" if name == "transposed" else name].layers
    return (
        name,
        draw(st.integers(2, layers)),
        draw(st.integers(1, 8)),
        draw(st.booleans()),
        draw(st.sampled_from(["shared", "own"])),
    )


@given(requests(), st.sampled_from(["fit", "zero"]))
def test_residuals_are_what_the_paper_says(request: tuple[str, int, int, bool, str], init: str) -> None:
    """Sizes, values and gradients in both lowerings, against the original with the weights U + A B + D."""
    name, k, rank, diagonal, bias = request
    model, program, inputs = captured(name)
    plan = f"residual k={k} r={rank} diagonal={'yes' if diagonal else 'no'} bias={bias}"
    found: dict[str, torch.nn.Module] = {}
    for lowering, start in (("factored", init), ("merged", "zero")):  # what is fitted does not depend on the lowering
        small = applied(model, program, f"{plan} init={start} lowering={lowering}", inputs)
        record = fxreuse.describe(small)
        groups = -(-len(model.layers) // k)
        assert in_projections(small) == expected_size(name, groups, rank, diagonal, bias == "own")
        assert size(small) == size(model) - record.parameters_removed + record.parameters_added
        assert {one.lowering for one in record.matrices} == {lowering}
        found[lowering] = copy.deepcopy(small)
    with torch.no_grad():  # residuals that are not zero
        for path in {path for one in record.matrices for path in one.residual.values()}:
            parameter = found["factored"].get_parameter(path)
            parameter.add_(0.1 * torch.randn_like(parameter))
    found["merged"].load_state_dict(found["factored"].state_dict())
    expected = meaning(model, found["factored"])(**inputs)
    for small in found.values():
        assert_same(small(**inputs), expected, EXACT)
        with torch.no_grad():
            assert_same(small(**inputs), expected, EXACT)
    one, other = (gradients(small, lambda: small(**inputs).square().sum()) for small in found.values())
    assert one.keys() == other.keys() == dict(found["merged"].named_parameters()).keys()
    assert_same(one, other, 1e-9)


@given(requests())
def test_full_rank_is_exact(request: tuple[str, int, int, bool, str]) -> None:
    """With biases of their own the layers compute what they did; shared ones cause the error that the record has."""
    name, k, _, diagonal, bias = request
    model, program, inputs = captured(name)
    plan = f"residual k={k} r=8 diagonal={'yes' if diagonal else 'no'} bias={bias}"
    small = applied(model, program, plan, inputs)
    record = fxreuse.describe(small)
    (fit,) = record.fits
    assert max(one.error for one in record.matrices) < EXACT
    assert fit.weights < EXACT
    expected, actual = model(**inputs), small(**inputs)
    error = float((actual - expected).detach().norm() / expected.detach().norm())
    assert abs(error - fit.output) < EXACT
    assert abs(fit.output - fit.biases) < EXACT
    if bias == "own":
        assert error < EXACT
    else:
        assert fit.biases > 0.01


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", ["k=2", "k=3 bias=own init=mean", "1+2"])
def test_sharing(name, options):
    model, program, inputs = captured(name)
    layers = len(model.layers)
    options = options if options != "1+2" or layers == 3 else "1+3"
    small = applied(model, program, f"share {options}")
    starts = {"k=2": range(0, layers, 2), "k": range(0, layers, 3), "1": range(2)}
    groups = len(starts.get(options) or starts[options[0]])
    assert in_projections(small) == expected_size(name, groups, 0, False, "own" in options)
    assert_same(small(**inputs), meaning(model, small)(**inputs), EXACT)
    matrices = fxreuse.describe(small).matrices
    assert len(matrices) == 6 * layers
    assert len({(one.shared, tuple(one.shared_rows)) for one in matrices}) == 6 * groups
    if "mean" in options:
        one = next(one for one in matrices if one.layer == 0)
        members = [each for each in matrices if each.shared == one.shared and each.rows == one.rows]
        mean = torch.stack([model.get_parameter(each.weight) for each in members]).mean(0)
        assert_same(small.get_parameter(one.shared).detach(), mean.detach(), EXACT)
    else:
        owners = {one.shared for one in matrices}
        assert all(small.get_parameter(path) is model.get_parameter(path) for path in owners)


@pytest.mark.parametrize(
    ("plan", "removed"),
    [
        ("2x2 | residual k=4 r=2 lowering=factored", 2),
        ("residual k=4 r=2 lowering=factored | 2x2", 2),
        ("4x1 | share k=2", 3),
        ("share k=2 | 4x1 lowering=recompute", 3),
        ("2x* | share k=3 | residual r=3", 2),
    ],
)
def test_with_reuse(plan, removed):
    """The order of the passes is that of the plan: weights of the original, maps of the leaders."""
    model, program, inputs = captured("split")
    small = applied(model, program, plan, inputs)
    leaders = {d.layer: d.layer for d in fxreuse.describe(small).decisions}
    sites = {d.site: d.layer for d in fxreuse.describe(small).decisions}
    leaders |= {d.layer: sites[d.leader] for d in fxreuse.describe(small).decisions if d.leader}
    assert sum(layer != leader for layer, leader in leaders.items()) == removed
    expected = meaning(model, small).run(tuple(leaders[layer] for layer in range(4)), **inputs)
    assert_same(small(**inputs), expected, EXACT)
    record = fxreuse.describe(small)
    assert size(small) == size(model) - record.parameters_removed + record.parameters_added


@pytest.mark.parametrize("name", ["thirds", "interleaved"])
@pytest.mark.parametrize(
    "rest", ["share k=3", "residual k=3 r=3 lowering=factored", "residual k=3 r=3 lowering=merged"]
)
def test_fused_values_of_followers_share_the_rows_of_their_leader(name, rest):
    model, program, inputs = captured(name)
    layers = len(model.layers)
    groups = "2+2" if layers == 4 else "2+1"
    leaders = (0, 0, 2, 2)[:layers]
    small = applied(model, program, f"{groups} | {rest}", inputs)
    expected = meaning(model, small).run(leaders, **inputs)
    assert_same(small(**inputs), expected, EXACT)
    record = fxreuse.describe(small)
    assert size(small) == size(model) - record.parameters_removed + record.parameters_added
    values = [one for one in record.matrices if one.role == "value" and one.group == 0]
    assert len({(one.shared, tuple(one.shared_rows)) for one in values}) == 1


def test_reuse_after_fused_weights_are_shared_is_refused():
    model, program, inputs = captured("thirds")
    with pytest.raises(fxreuse.PlanError, match="which followers would keep the rows of their values") as raised:
        applied(model, program, "share k=2 | 2x2 | residual r=2", inputs)
    order = re.search(r"write the reuse pass first: '(.*)'", str(raised.value)).group(1)
    assert order == "2x2 | share k=2 | residual r=2"
    assert fxreuse.describe(applied(model, program, order, inputs)).plan == order


def test_residuals_on_a_model_that_shares_its_weights():
    """U stays, and the function, and the new parameters can learn; as in one plan."""
    model, program, inputs = captured("thirds")
    shared = copy.deepcopy(applied(model, program, "share k=3"))
    with torch.no_grad():
        for parameter in shared.parameters():
            parameter.mul_(1.1)
    small = fxreuse.apply(shared, "residual r=2 lowering=factored", inputs)
    assert_same(small(**inputs), shared(**inputs), EXACT)
    before = dict(shared.named_parameters())
    assert all(before[name] is parameter for name, parameter in small.named_parameters() if name in before)
    together = applied(model, program, "share k=3 | residual r=2")
    assert {n: p.shape for n, p in small.named_parameters()} == {n: p.shape for n, p in together.named_parameters()}
    found = gradients(small, lambda: small(**inputs).square().sum())
    assert all(found[name].abs().max() > 0 for name in found if name.endswith((".B", ".D")))
    assert [note.kind for note in fxreuse.describe(small).notes] == ["fit"]
    with pytest.raises(fxreuse.PlanError, match="have residuals"):
        fxreuse.apply(small, "residual r=2", inputs)


class Twice(torch.nn.Module):
    """One layer that is called twice, as ALBERT's is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(x))


def test_a_layer_that_is_called_twice():
    """It shares its weights already: each call gets residuals of its own."""
    model, x = Twice().double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    small = fxreuse.apply(model, "residual r=2", x)
    assert size(small) - size(model) == 2 * (2 * (4 * 16 + 2 * 20) + 6 * 8)
    assert_same(small(x), model(x), EXACT)
    with pytest.raises(fxreuse.PlanError, match="nothing to share"):
        fxreuse.apply(model, "share k=2", x)


class Uneven(torch.nn.Module):
    def __init__(self, widths: tuple[int, ...], biases: tuple[bool, ...] = (True, True)) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(8, 2, width, batch_first=True, bias=bias)
            for width, bias in zip(widths, biases, strict=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_of_unequal_shape_are_refused():
    x = torch.randn(2, 5, 8)
    with pytest.raises(fxreuse.PlanError) as caught:
        fxreuse.apply(Uneven((12, 16)), "share k=2", x)
    assert str(caught.value) == (
        "layers.0 and layers.1 are in one group, but layers.0.linear1.weight of 8×12 and layers.1.linear1.weight of "
        "8×16 differ in shape; layers that share weights are of one size."
    )


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("share k=1", "leaves each of the 4 layers .* nothing to share; choose k from 2 to 4"),
        ("share k=5", "k=5 is more than the 4 layers of stack .*; choose k from 2 to 4"),
        ("residual k=9 r=2", "k=9 is more than the 4 layers"),
        ("share 2+3", "is for 5 layers, found 4 layers in stack"),
        ("residual k=2 r=9", r"r=9 is more than full rank: .* 8×8; choose r from 1 to 8"),
        ("share k=2 | residual r=9", "r=9 is more than full rank"),
        ("residual r=2", r"share no weights.*write 'residual k=3 r=16'"),
        ("share k=2 | share k=4", "shares the weights of stack .* twice"),
        ("share k=2 | residual k=2 r=2", "leave k= out of the residual pass"),
        ("residual k=2 r=2 | residual r=2", "adds residuals to the stack .* twice"),
        ("share k=2 | 2x2 values=2", "changes the sizes of weights; write the reuse pass first"),
        ("2x2 values=2 | share k=2", "differ in shape"),
    ],
)
def test_what_does_not_fit(plan, message):
    model, program, inputs = captured("split")
    with pytest.raises(fxreuse.PlanError, match=message):
        applied(model, program, plan, inputs)


class Mirrored(torch.nn.Module):
    """Two layers that do the same; the second one has other names, and writes its lines in another order."""

    class One(torch.nn.Module):
        def __init__(self, names: tuple[str, ...], swapped: bool) -> None:
            super().__init__()
            self.names, self.swapped = names, swapped
            for name, (inputs, outputs) in zip(names, [(8, 8)] * 4 + [(8, 8)] * 2, strict=True):
                self.add_module(name, torch.nn.Linear(inputs, outputs))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v, o, gate, up = (self.get_submodule(name) for name in self.names)
            if self.swapped:
                values, keys, queries = v(x), k(x), q(x)
            else:
                queries, keys, values = q(x), k(x), v(x)
            context = torch.nn.functional.scaled_dot_product_attention(queries[:, None], keys[:, None], values[:, None])
            x = x + o(context[:, 0])
            if self.swapped:
                opened = up(x)
                return x + torch.nn.functional.silu(gate(x)) * opened
            return x + torch.nn.functional.silu(gate(x)) * up(x)

    def __init__(self) -> None:
        super().__init__()
        first, second = ("q", "k", "v", "o", "gate", "up"), ("k", "v", "q", "up", "o", "gate")
        self.layers = torch.nn.ModuleList([self.One(first, False), self.One(second, True)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_projections_correspond_by_their_place_and_not_by_name_or_order():
    program = load_program(Mirrored().eval(), torch.randn(2, 5, 8))
    sites = find(program)
    block = find_block(program, sites, next(iter(sites.stacks)))
    pairs = {tuple(path.split(".")[2] for path in place.weights) for place in block.places}
    assert pairs == {("q", "k"), ("k", "v"), ("v", "q"), ("o", "up"), ("gate", "o"), ("up", "gate")}


def test_verify_compares_with_the_weights_that_are_meant():
    model, program, inputs = captured("interleaved")
    small = applied(model, program, "2+1 | residual k=3 r=2", inputs)
    check = fxreuse.verify(model, small, inputs, compile=False, latency=False)
    assert check.passed
    assert check.outputs.required
    assert check.outputs.against == "eager sharing, 1 follower, its weights shared"
    wrong = copy.deepcopy(small)
    matrix = next(one for one in fxreuse.describe(wrong).matrices if one.layer == 2 and one.residual)
    owner = wrong.get_submodule("layers.2")
    assert matrix.residual["D"].startswith("layers.2.")
    node = next(node for node in owner.graph.nodes if node.op == "get_attr" and node.target.endswith("D"))
    with owner.graph.inserting_after(node):
        zero = owner.graph.call_function(torch.ops.aten.mul.Tensor, (node, 0.5))
    node.replace_all_uses_with(zero, delete_user_cb=lambda user: user is not zero)
    owner._set_graph(owner.graph)
    assert not fxreuse.verify(model, wrong, inputs, compile=False, latency=False).passed


def test_the_record_prints_a_line_for_each_place():
    model, program, inputs = captured("split")
    text = str(fxreuse.describe(applied(model, program, "residual k=2 r=3", inputs)))
    assert "weight, first layer" in text
    assert text.count("8×8 ") == 4
    assert "of shared biases alone" in text
    assert "layer    site" not in text
