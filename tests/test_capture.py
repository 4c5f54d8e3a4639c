"""Capture: the three ways, what is said of sizes, the forms of inputs, and a model that is left as it was."""

from __future__ import annotations

import copy
import gc
import random
from typing import Any

import numpy
import pytest
import torch
import transformers as hf
from torch import nn
from torch.export import Dim

from fxreuse.errors import CaptureError, InputError
from fxreuse.frontend import witness
from fxreuse.frontend.capture import capture
from fxreuse.frontend.example_sizes import widen_batch
from fxreuse.frontend.inputs import Inputs
from fxreuse.frontend.load import load_program
from fxreuse.program import FOLLOWS, Leaf, Program

from .running import changes, named_tensors, snapshot

X = (2, 5, 6)


def run(program: Program, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return list(named_tensors(program.copy().module(*tensors)).values())


def free_dims(program: Program) -> list[list[int]]:
    """Per input, the dimensions that no guard fixes."""
    fixed = {guard.sizes()[0] for guard in program.guards if " == " in guard.source and len(guard.sizes()) == 1}
    return [[dim for dim in range(leaf.ndim) if (leaf.name, dim) not in fixed] for leaf in program.call.leaves]


class OnlyStrict(nn.Module):
    """Sizes are no numbers under the non-strict way, but look like some under the strict one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x.shape[1], int):
            raise TypeError("sizes have to be numbers")
        return x * x.shape[1]


class OnlyStatic(OnlyStrict):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_dynamo_compiling():
            raise TypeError("not under dynamo")
        return super().forward(x)


class ByValue(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return x * 2


class Table(nn.Module):
    """A table of positions of one length."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table


class Busy(nn.Module):
    """Writes to everything that a forward can write to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(5), nn.Dropout(0.5))
        self.register_buffer("count", torch.zeros(()))
        self.table: torch.Tensor | None = None
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        if self.table is None or len(self.table) != x.shape[1]:
            self.table = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
            self.seen.append(len(self.seen))
        random.random(), numpy.random.rand(), torch.rand(2)
        return self.layers(x) + self.table


class Structured(nn.Module):
    def forward(self, x: torch.Tensor, *, scale: float = 1.0, flag: bool = False, extra: Any = None) -> dict[str, Any]:
        y = x * scale
        if extra is not None:
            y = y + extra["a"][0] - extra["a"][1]
        return {"y": y if flag else -y, "pair": (x, y)}


def test_free_sizes() -> None:
    program = capture(nn.Linear(6, 4), torch.randn(X))
    assert free_dims(program) == [[0, 1]]
    assert program.notes == ()


@pytest.mark.parametrize(
    ("module", "free", "noted"),
    [(OnlyStrict(), [[0, 1, 2]], False), (OnlyStatic(), [[]], True)],
    ids=["strict", "static"],
)
def test_the_next_way_is_taken(module: nn.Module, free: list[list[int]], noted: bool) -> None:
    x = torch.randn(X)
    program = capture(module, x)
    assert free_dims(program) == free
    (result,) = run(program, x)
    assert torch.equal(result, x * 5)
    assert [note.kind for note in program.notes] == ["size"] * noted
    for note in program.notes:
        assert note.where == "x"
        assert all(f"dimension {dim} = {size}" in str(note) for dim, size in enumerate(X))


def test_where_nothing_works_the_line_at_fault_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(ByValue(), torch.randn(X))
    text = str(caught.value)
    line = ByValue.forward.__code__.co_firstlineno + 1
    for part in (f"{__file__}:{line} in forward", "ByValue", "target=", "free sizes, strict", "fixed sizes"):
        assert part in text
    assert caught.value.__cause__ is not None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("table", "given", "dim"), [((2, 1), (2, 7), 0), ((1, 7), (2, 7), 1), ((3, 1, 1), (3, 4, 5), 0)]
)
def test_a_batch_or_length_that_was_fixed_is_noted(table: Any, given: Any, dim: int) -> None:
    program = capture(Table(*table), torch.randn(given))
    assert dim not in free_dims(program)[0]
    assert [(note.kind, note.where) for note in program.notes] == [("size", "x")]
    assert f"dimension {dim} = {given[dim]}" in str(program.notes[0])


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_of_one_stays_free_and_inputs_are_left_alone(batch: int) -> None:
    x = torch.randn(batch, 5, 6, requires_grad=True)
    kept, given = x.detach().clone(), {"input": x}
    program = capture(nn.Linear(6, 4), given)
    assert free_dims(program) == [[0, 1]]
    assert given == {"input": x}
    assert x.shape == kept.shape
    assert torch.equal(x, kept)
    assert x.grad is None
    assert x.requires_grad
    assert vars(x) == {}, "export leaves marks on the tensors that it is given"


@pytest.mark.parametrize(
    ("shapes", "wide"),
    [
        ([(1, 5)], 2),
        ([(1, 2), (1, 3)], 4),
        ([(2, 5)], 2),
        ([(3, 3)], 4),
        ([(1, 5), (4, 5)], None),
        ([(1, 5), ()], None),
    ],
)
def test_widened_batch(shapes: list[tuple[int, ...]], wide: int | None) -> None:
    tensors = [torch.randn(shape) for shape in shapes]
    args, kwargs = widen_batch(Inputs(tuple(tensors), {"flag": True}))
    assert kwargs == {"flag": True}
    for old, new in zip(tensors, args, strict=True):
        if wide is None:
            assert new is old
        else:
            assert new.shape == (wide, *old.shape[1:])
            assert all(torch.equal(new[row], old[row % len(old)]) for row in range(wide))


@pytest.mark.parametrize("what", ["values", "mode", "attributes", "random", "hooks", "identity", "globals"])
def test_the_model_is_left_as_it_was(what: str) -> None:
    model = Busy().train()
    model.layers[2].eval()
    before = snapshot(model)[what]
    load_program(model, torch.ones(X))
    assert changes(before, snapshot(model)[what]) == []
    assert model.table is None
    assert model.seen == []


def test_a_failed_capture_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(Busy(), ByValue()).train()
    x = torch.randn(X)
    before = snapshot(model)
    with pytest.raises(CaptureError):
        capture(model, x)
    after = snapshot(model)
    assert {kind: changes(before[kind], after[kind]) for kind in before} == {kind: [] for kind in before}
    assert model[0].table is None


def test_a_cached_tensor_of_an_attribute_comes_back() -> None:
    model = Busy().eval()
    table = model.table = torch.full((7, 1), 3.0)
    capture(model, torch.randn(X))
    assert model.table is table
    assert torch.equal(table, torch.full((7, 1), 3.0))


class Converting(nn.Module):
    """Converts a part of itself to what it is already."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear.to(x.device, self.linear.weight.dtype)(x)


def test_conversions_that_change_nothing_leave_no_trace() -> None:
    model = Converting()
    program = capture(model, torch.randn(X))
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == ["aten.linear.default"]
    assert "to" not in vars(model.linear)
    assert model.double().linear.weight.dtype is torch.float64


class Remembering(nn.Module):
    """Keeps the length that it saw last, as Funnel does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.length = x.shape[1]
        return x * torch.arange(self.length).to(x.dtype)[:, None]


def test_a_length_that_a_model_remembers_does_not_hide_what_follows_its_dtype() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Remembering())
    program = capture(model, torch.randn(X))
    (cast,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.to.dtype)
    assert cast.meta[FOLLOWS]
    assert program.notes == ()


class Moving(nn.Module):
    """Moves a value to the device of another one, and no more than that names a dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.sin().to(x.device)


def test_what_is_moved_to_a_device_needs_no_trace_in_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_twin(*_: object) -> None:
        raise AssertionError("a second trace")

    monkeypatch.setattr(witness, "_twin_calls", no_twin)
    model = nn.Sequential(nn.Linear(6, 6), Moving())
    program = load_program(model, torch.randn(X))
    assert program.notes == ()
    x = torch.randn(X, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(program.module).double()(x)[0], copy.deepcopy(model).double()(x))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_on_again_if_it_was(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    try:
        load_program(nn.Linear(6, 6), torch.randn(X))
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_key_value_caches_are_off_and_come_back() -> None:
    config = hf.LlamaConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, use_cache=True
    )
    model = hf.LlamaModel(config)
    seen = []
    hook = model.register_forward_pre_hook(lambda *_: seen.append(config.use_cache))
    program = capture(model, {"input_ids": torch.randint(3, 99, (2, 5))})
    hook.remove()
    assert set(seen) == {False}
    assert config.use_cache is True
    shapes = [node.meta["val"].dim() for node in program.graph.output_node().all_input_nodes]
    assert shapes == [3], "only hidden states come out, no keys and values"


def test_named_arguments_structures_and_constants() -> None:
    x, a, b = (torch.randn(X) for _ in range(3))
    program = capture(Structured(), {"extra": {"a": [a, b]}, "x": x, "scale": 2.0, "flag": True})
    assert [leaf.name for leaf in program.call.leaves] == ["x", "extra['a'][0]", "extra['a'][1]"]
    assert [argument.name for argument in program.call.arguments] == ["x", "scale", "flag", "extra"]
    constants = [leaf for argument in program.call.arguments for leaf in argument.leaves if not isinstance(leaf, Leaf)]
    assert constants == [2.0, True]
    assert len(program.graph.find_nodes(op="placeholder")) == 3
    expected = x * 2 + a - b
    assert all(torch.equal(*pair) for pair in zip(run(program, x, a, b), (expected, x, expected), strict=True))
    assert program.call.out_spec == torch.utils._pytree.tree_structure({"y": 0, "pair": (0, 0)})


def test_positional_arguments_by_the_names_of_the_signature() -> None:
    program = capture(nn.Bilinear(3, 4, 5), (torch.randn(2, 3), torch.randn(2, 4)))
    assert [argument.name for argument in program.call.arguments] == ["input1", "input2"]


def test_defaults_are_known_as_accepted() -> None:
    call = capture(Structured(), torch.randn(X)).call
    assert [argument.name for argument in call.arguments] == ["x"]
    assert {name: values[0] for name, values in call.accepted.items() if name != "x"} == {
        "scale": 1.0,
        "flag": False,
        "extra": None,
    }


def test_wrong_inputs_are_refused_as_such() -> None:
    with pytest.raises(InputError, match="colour"):
        capture(Structured(), {"x": torch.randn(X), "colour": 1})


def test_exported_program() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU()).eval()
    x = torch.randn(X)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    before = copy.deepcopy(exported.state_dict)
    program = load_program(exported)
    assert free_dims(program) == [[0, 1]]
    assert [note.kind for note in program.notes] == ["training"]
    assert "pass the model itself" in str(program.notes[0])
    other = torch.randn(3, 7, 6)
    assert torch.equal(run(program, other)[0], model(other))
    assert all(torch.equal(value, before[name]) for name, value in exported.state_dict.items())


def test_parameters_are_the_models_own() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(5))
    program = load_program(model, torch.randn(X))
    assert {name: id(value) for name, value in program.parameters().items()} == {
        name: id(value) for name, value in model.named_parameters()
    }


def test_non_persistent_buffers_are_known() -> None:
    model = nn.Linear(6, 6)
    model.register_buffer("kept", torch.ones(6))
    model.register_buffer("lost", torch.ones(6), persistent=False)
    model.forward = lambda x: x * model.kept + model.lost
    assert capture(model, torch.randn(X)).non_persistent == {"lost"}
