"""Normalisation, pass by pass: what each of them changes, and that the module stays the same function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxreuse.frontend.load import load_program
from fxreuse.nodes import inserting_before
from fxreuse.program import Program

from .running import assert_same_gradients, gradients, named_tensors

Forward = Callable[..., Any]
X = (2, 5, 6)


class Body(nn.Module):
    """A module with a linear layer, a buffer and a constant, whose forward is a function of it."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6))
        self.register_buffer("count", torch.zeros(6))
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def load(function: Forward, *shapes: tuple[int, ...]) -> tuple[Body, Program]:
    model = Body(function).eval()
    return model, load_program(model, tuple(torch.randn(shape) for shape in shapes or (X,)))


def targets(program: Program) -> list[str]:
    """What the calls of the graph are, in order: ``add.Tensor``, ``linear.default``, or the path of a module."""
    calls = [node for node in program.graph.nodes if node.op.startswith("call")]
    return [str(node.target).removeprefix("aten.") for node in calls]


def outputs(module: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(named_tensors(copy.deepcopy(module)(*(tensor.clone() for tensor in inputs))).values())


def assert_equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in wanted]
    assert len(found) == len(wanted) > 0
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def assert_same_function(model: nn.Module, program: Program, *shapes: tuple[int, ...]) -> None:
    for length in (5, 7):
        inputs = [torch.randn(shape[0], length, *shape[2:]) for shape in shapes or (X,)]
        assert_equal(outputs(program.module, *inputs), outputs(model, *inputs))


# Regions


def positions(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[1], device=x.device, dtype=torch.float32)


def test_no_grad_region_is_inlined_and_detached() -> None:
    def forward(self: Body, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x)
        with torch.no_grad():
            weights = (h * self.scale).softmax(-1)
        return h * weights

    model, program = load(forward)
    assert targets(program).count("detach.default") == 1
    assert not any("wrap_with" in target for target in targets(program))
    assert not [name for name, _ in program.module.named_modules() if "submod" in name]
    assert_same_function(model, program)
    x = torch.randn(X)
    wanted, found = gradients(model, model(x)), gradients(program.module, program.module(x))
    assert wanted["scale"] is None
    assert found.get("scale") is None
    assert_same_gradients({"linear.weight": found["linear.weight"]}, wanted)


def test_regions_inside_regions() -> None:
    def forward(self: Body, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            table = positions(x)[:, None] * self.scale
            with torch.enable_grad():
                h = self.linear(x)
            with torch.autocast("cpu", enabled=False):
                table = table * 2
        return h + table

    model, program = load(forward)
    assert not any("wrap_with" in target for target in targets(program))
    assert_same_function(model, program)


def test_a_region_may_give_a_size() -> None:
    def forward(self: Body, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            length, scale = x.shape[1] * 2, self.scale * 2
        return (self.linear(x) * scale).repeat(1, 2, 1) + x.new_ones(length, 1)

    model, program = load(forward)
    assert not any("wrap_with" in target for target in targets(program))
    assert_same_function(model, program)


@pytest.mark.parametrize("operator", [torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default])
def test_a_new_node_leaves_sizes_free(operator: Any) -> None:
    _, program = load(lambda self, x: self.linear(x))
    (node,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    with inserting_before(node) as insert:
        padded = insert(operator, node.args[0], [0, 0, 0, 1])
    assert isinstance(padded.meta["val"].shape[1], torch.SymInt)
    assert (
        not node.meta["val"].fake_mode.shape_env.replacements.keys() & node.meta["val"].shape[0].node.expr.free_symbols
    )


def test_rotary_table_stays_outside_autocast() -> None:
    def forward(self: Body, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            frequencies = torch.arange(1, 4, dtype=torch.float32, device=x.device)[None, :, None] / 7
            angles = (frequencies.float() @ positions(x)[None, None].float()).transpose(1, 2)
            table = torch.cat([angles.cos(), angles.sin()], -1)
        return self.linear(x) * table.to(x.dtype)

    model, program = load(forward)
    assert "matmul.default" not in targets(program)
    assert program.notes == ()
    assert_same_function(model, program)
    x = torch.randn(2, 300, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(outputs(program.module, x), outputs(model, x))


def test_a_product_outside_autocast_is_noted() -> None:
    def forward(self: Body, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.linear(x)

    _, program = load(forward)
    (note,) = program.notes
    assert "autocast" in str(note)


# In-place operators, views, and what does nothing


def chain(self: Body, x: torch.Tensor) -> torch.Tensor:
    h = self.linear(x).relu_().add_(x)
    return h.masked_fill_(h > 1, 2.0).mul_(self.scale)


def read_before_and_after(self: Body, x: torch.Tensor) -> torch.Tensor:
    h = self.linear(x)
    before = h * 3
    h += 1
    middle = h * 5
    h *= 2
    return before + middle + h


def read_for_its_sizes(self: Body, x: torch.Tensor) -> torch.Tensor:
    h = self.linear(x)
    mask = (x.sum((1, 2), keepdim=True) > 0).expand_as(h)
    return h.masked_fill_(mask, 2.0) * 3


def on_the_only_view(self: Body, x: torch.Tensor) -> torch.Tensor:
    turned = self.linear(x).reshape(x.shape[0], -1, 2, 3).transpose(1, 2)
    turned /= 3.0
    return turned


@pytest.mark.parametrize("forward", [chain, read_before_and_after, read_for_its_sizes, on_the_only_view])
def test_in_place_on_a_fresh_value_becomes_functional(forward: Forward) -> None:
    model, program = load(forward)
    assert not any(target.partition(".")[0].endswith("_") for target in targets(program))
    assert_same_function(model, program)


def view_before(self: Body, x: torch.Tensor) -> torch.Tensor:
    h = self.linear(x)
    view = h.transpose(1, 2)
    h.add_(1)
    return view * 2


def through_a_view(self: Body, x: torch.Tensor) -> torch.Tensor:
    h = self.linear(x)
    h.flatten(0, 1).add_(1)
    return h


def through_a_slice(self: Body, x: torch.Tensor) -> torch.Tensor:
    h = self.linear(x)
    h[:, :, 1:4] *= 2
    return h


def through_a_reshape(self: Body, x: torch.Tensor) -> torch.Tensor:
    h = self.linear(x)
    h.reshape(-1, 3).mul_(2)
    return h


def through_an_einsum(self: Body, x: torch.Tensor) -> Any:
    h = self.linear(x)
    torch.einsum("btd->bdt", h).add_(1)
    return h * 2


def einsum_before(self: Body, x: torch.Tensor) -> Any:
    h = self.linear(x)
    turned = torch.einsum("btd->bdt", h)
    h.mul_(3)
    return turned * 2


def meshgrid_before(self: Body, x: torch.Tensor) -> Any:
    h = self.linear(x).sum((0, 1))
    rows, columns = torch.meshgrid(h, h, indexing="ij")
    h.mul_(3)
    return rows - columns * 2


def through_an_idle_cast(self: Body, x: torch.Tensor) -> Any:
    h = self.linear(x)
    h.to(x.dtype).add_(1)
    return h * 2


def on_the_input(self: Body, x: torch.Tensor) -> Any:
    y = x * 3
    x.mul_(2)
    return y, self.linear(x)


ALIASED = [
    view_before, through_a_view, through_a_slice, through_a_reshape, through_an_einsum, einsum_before, meshgrid_before,
    through_an_idle_cast, on_the_input,
]  # fmt: skip


@pytest.mark.parametrize("forward", ALIASED)
def test_in_place_that_others_see(forward: Forward) -> None:
    model, program = load(forward)
    assert_same_function(model, program)


def test_in_place_on_the_input_changes_the_callers_tensor() -> None:
    _, program = load(on_the_input)
    x = torch.ones(X)
    program.module(x)
    assert torch.equal(x, torch.full(X, 2.0))


def test_in_place_on_a_buffer_stays() -> None:
    def forward(self: Body, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return self.linear(x) + self.count

    model, program = load(forward)
    assert "add_.Tensor" in targets(program)
    assert not model.count.any(), "loading must not count"
    for number in (1.0, 2.0):
        program.module(torch.randn(X))
        assert torch.equal(model.count, torch.full((6,), number)), "the buffer is the model's own"


def test_views_become_reshapes() -> None:
    model, program = load(lambda self, x: self.linear(x).view(x.shape[0], -1, 3))
    assert "view.default" not in targets(program)
    assert_same_function(model, program)


def test_what_does_nothing_goes() -> None:
    def forward(self: Body, x: torch.Tensor) -> torch.Tensor:
        torch.rand(3)
        torch.randn(x.shape).mul_(2).softmax(-1)
        return self.linear(x[:, :, :][:])[:, :, -6:]

    model, program = load(forward)
    assert targets(program) == ["linear.default"]
    assert_same_function(model, program)


def test_a_slice_that_cuts_stays() -> None:
    for cut in (lambda x: x[:, 1:], lambda x: x[:, :-1], lambda x: x[:, ::2], lambda x: x[:, :3]):
        model, program = load(lambda self, x, cut=cut: self.linear(cut(x)))
        assert targets(program).count("slice.Tensor") == 1
        assert_same_function(model, program)


@pytest.mark.parametrize("dim", [-1, 2, 1])
def test_chunk_of_a_concatenation(dim: int) -> None:
    def forward(self: Body, x: torch.Tensor) -> torch.Tensor:
        first, second = torch.cat([x + 1, x * 2], dim).chunk(2, dim)
        return first * self.scale - second

    model, program = load(forward)
    assert "chunk.default" not in targets(program)
    assert "cat.default" not in targets(program)
    assert_same_function(model, program)


def test_chunk_of_unequal_parts_stays() -> None:
    def forward(self: Body, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        first, second = torch.cat([x, y], -1).chunk(2, -1)
        return first - second

    model, program = load(forward, (2, 5, 6), (2, 5, 4))
    assert "chunk.default" in targets(program)
    assert_same_function(model, program, (2, 5, 6), (2, 5, 4))


# Device and dtype


def factories(self: Body, x: torch.Tensor) -> torch.Tensor:
    h = self.linear(x.to(self.scale.device))
    h = h + torch.arange(x.shape[1], device=x.device)[:, None] + torch.full((6,), 2.0, device=x.device)
    h = h * torch.linspace(0.5, 1, 6, device=x.device, dtype=x.dtype) + x.new_ones(6) + torch.ones_like(x)
    return h.to(x.device)


def test_no_device_is_left_in_the_graph() -> None:
    model, program = load(factories)
    assert_same_function(model, program)
    named = [value for node in program.graph.nodes for value in (*node.args, *node.kwargs.values())]
    assert not [value for value in named if isinstance(value, torch.device)]
    meta = copy.deepcopy(program.module).to("meta")
    (result,) = named_tensors(meta(torch.randn(X, device="meta"))).values()
    assert (result.device.type, result.shape) == ("meta", torch.Size(X))


def rms_norm(self: Body, x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return self.scale * normed.to(x.dtype)


def float_softmax(self: Body, x: torch.Tensor) -> Any:
    return F.softmax(self.linear(x), -1, dtype=torch.float32).to(x.dtype), self.linear(x).float()


def float_scores(self: Body, x: torch.Tensor) -> torch.Tensor:
    q = self.linear(x)
    scores = (q.float() @ q.float().mT).masked_fill(x[..., :1] > 0, -1e9)
    return F.softmax(scores, -1, dtype=torch.float32).to(x.dtype) @ q


def float_means(self: Body, x: torch.Tensor) -> torch.Tensor:
    values = self.linear(x).reshape(-1)
    index = torch.arange(values.shape[0], device=x.device) % 3
    means = torch.zeros(3, dtype=torch.float32, device=x.device)
    return x * means.scatter_reduce(0, index, values.float(), "amin", include_self=False).sum().to(x.dtype)


def beside_its_cast(self: Body, x: torch.Tensor) -> Any:
    h = self.linear(x)
    return h + h.float(), h.float() * h, h - 1


def after_casts_there_and_back(self: Body, x: torch.Tensor) -> Any:
    h = self.linear(x)
    wide = h.float()
    return wide * 2, wide.to(x.dtype), h.pow(2).float(), h + 1


def sliced_beside_its_cast(self: Body, x: torch.Tensor) -> Any:
    h = self.linear(x)
    wide = h.float()
    return wide / 3, h[:, : x.shape[1]] / 3, wide[:, : x.shape[1]] / 3, h[:, :2].contiguous() / 3


def cast_inside_a_region(self: Body, x: torch.Tensor) -> Any:
    h = self.linear(x)
    with torch.no_grad():
        wide = h.float()
        share, rest = wide / 3, h / 3
    return h * rest, share


def made_in_float(self: Body, x: torch.Tensor) -> Any:
    fixed = torch.zeros(6, dtype=torch.float32, device=x.device) + 1 / 3
    own = torch.full((6,), 1 / 3, dtype=x.dtype, device=x.device)
    return self.linear(x) * fixed, own * 1


def moved_to_a_device(self: Body, x: torch.Tensor) -> Any:
    h = self.linear(x)
    moved = h.to(x.device)
    wide = h.float().to(x.device)
    return moved / 3, wide / 3, (wide.to(x.device, copy=True) - 1), h.to(x.device, copy=True) + 1


def from_a_number_in_float(self: Body, x: torch.Tensor) -> torch.Tensor:
    """Falcon's slopes: a factory, a power with integers, a cast, and back to the model's."""
    base = torch.full((), 0.3, dtype=torch.float32, device=x.device)
    slopes = (base ** torch.arange(1, 7, device=x.device)).bfloat16()
    return self.linear(x) / (slopes * torch.arange(1, 7, device=x.device)).to(x.dtype)


def from_the_default_type(self: Body, x: torch.Tensor) -> torch.Tensor:
    """DETR's positions: ones of no type, a cast to truth, and then to the model's."""
    seen = (torch.ones(x.shape[1], device=x.device)[:, None] * 2).bool()
    return self.linear(x) * (seen.to(x.dtype).cumsum(0) / 3)


@pytest.mark.parametrize("length", [5, 7])
@pytest.mark.parametrize(
    "forward",
    [
        from_a_number_in_float,
        from_the_default_type,
        rms_norm,
        float_softmax,
        float_scores,
        float_means,
        beside_its_cast,
        after_casts_there_and_back,
        sliced_beside_its_cast,
        cast_inside_a_region,
        made_in_float,
        moved_to_a_device,
        factories,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_means_what_it_means_for_the_original(forward: Forward, length: int, dtype: torch.dtype) -> None:
    model, program = load(forward)
    assert program.notes == ()
    x = torch.randn(2, length, 6, dtype=torch.float64).to(dtype)
    assert_equal(outputs(copy.deepcopy(program.module).to(dtype), x), outputs(copy.deepcopy(model).to(dtype), x))
    assert_same_function(model, program)


def test_autocast_means_what_it_means_for_the_original() -> None:
    model, program = load(rms_norm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_function(model, program)


# Train and eval


class Scaled(nn.Module):
    """Stochastic depth as libraries write it: a whole row is dropped, the others are scaled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(0.5).div_(0.5)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [part.view(*x.shape[:2], 2, 3).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]
        out = F.scaled_dot_product_attention(*parts, dropout_p=0.4 if self.training else 0.0)
        return out.transpose(1, 2).reshape(x.shape)


class MultiHead(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.weights, self.inner = weights, nn.MultiheadAttention(6, 2, dropout=0.4, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        found = self.inner(x, x, x, need_weights=self.weights)
        return found if self.weights else found[0]


class Functional(nn.Module):
    """Two probabilities, one that is 0, and one dropout that is always on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(x, 0.3, self.training) + F.dropout(x, 0.6, self.training) * 2
        return F.dropout(x, 0.0, self.training)


TRAINED: dict[str, Callable[[], nn.Module]] = {
    "Dropout": lambda: nn.Dropout(0.4),
    "functional": Functional,
    "fused attention": Fused,
    "multi-head attention": lambda: MultiHead(weights=False),
    "multi-head attention with weights": lambda: MultiHead(weights=True),
    "stochastic depth": Scaled,
    "all of them": lambda: nn.Sequential(Fused(), nn.Dropout(0.1), Scaled(), Functional(), MultiHead(False)),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_bit_equal_from_one_seed(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), TRAINED[name]())
    program = load_program(model, torch.randn(X))
    x = torch.randn(3, 7, 6)
    found = []
    for module in (model, program.module):
        module.eval()
        calm = outputs(module, x)
        module.train()
        torch.manual_seed(3)
        output = module(x)
        found.append((calm, list(named_tensors(output).values()), gradients(module, output)))
    (calm, wild, slopes), (program_calm, program_wild, program_slopes) = found
    assert_equal(program_calm, calm)
    assert_equal(program_wild, wild)
    assert not torch.equal(calm[0], wild[0]), "training mode has to differ for this test to say anything"
    assert_same_gradients({name: slope for name, slope in program_slopes.items() if name in slopes}, slopes)


def test_dropout_that_is_always_on_stays() -> None:
    _, program = load(lambda self, x: F.dropout(self.linear(x), 0.5, True))
    assert "dropout.default" in targets(program)


def test_running_statistics_are_shared_and_updated_as_the_originals() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(5, momentum=0.3))
    twin = copy.deepcopy(model)
    program = load_program(model, torch.randn(X))
    found: list[list[torch.Tensor]] = []
    for module in (program.module, twin):
        module.train()
        torch.manual_seed(0)
        found.append([tensor for _ in range(3) for tensor in named_tensors(module(torch.randn(3, 5, 6))).values()])
    assert_equal(*found)
    assert int(model[1].num_batches_tracked) == 3
    for name, buffer in twin.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    assert_equal(outputs(program.module.eval(), torch.ones(X)), outputs(twin.eval(), torch.ones(X)))
