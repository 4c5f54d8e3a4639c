"""Guards as data, as sentences, and as a function that checks the sizes of inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from fxreuse.errors import CaptureError, InputError
from fxreuse.frontend.guards import allow_batch_of_one, checker, from_export, holds, make_guard
from fxreuse.frontend.load import load_program
from fxreuse.program import Guard, Leaf, Program

X = (Leaf("x", 3),)


def check(program: Program, *shapes: tuple[int, ...]) -> None:
    leaves = program.call.leaves
    dtypes = [torch.long if leaf.kind == "integer" else torch.float32 for leaf in leaves]
    tensors = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    checker(program.guards, leaves, program.name)(*tensors)


class ByLength(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[1] % 4 == 0 else x + 1


class ByBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] == 1 else x + 1


class Sum(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


class Nested(nn.Module):
    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        first, second = inputs["x"]
        return first * second.sum() if first.shape[1] % 4 == 0 else first


@pytest.mark.parametrize(("length", "fits", "refused"), [(8, 12, 9), (5, 7, 8)])
def test_branch_on_a_length(length: int, fits: int, refused: int) -> None:
    program = load_program(ByLength(), torch.zeros(2, length, 3))
    check(program, (5, fits, 3))
    with pytest.raises(InputError) as caught:
        check(program, (5, refused, 3))
    for part in ("ByLength: ", "x.shape[1] % 4", f"x.shape[1] = {refused}", "example_inputs"):
        assert part in str(caught.value)


def test_equal_sizes_of_two_inputs() -> None:
    program = load_program(Sum(), (torch.zeros(2, 5, 3), torch.zeros(2, 5, 3)))
    check(program, (3, 7, 4), (3, 7, 4))
    for dim in range(3):
        shape = [3, 7, 4]
        shape[dim] = 9
        with pytest.raises(InputError, match=rf"x\.shape\[{dim}\] = 9, y\.shape\[{dim}\] = "):
            check(program, tuple(shape), (3, 7, 4))


def test_image_axes_are_fixed_and_the_batch_is_free() -> None:
    program = load_program(nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 6))
    assert [guard.text for guard in program.guards] == [
        f"input: dimension {dim} must be {size}" for dim, size in ((1, 3), (2, 8), (3, 6))
    ]
    check(program, (5, 3, 8, 6))
    with pytest.raises(InputError, match=r"input: dimension 3 must be 6; found input\.shape\[3\] = 7"):
        check(program, (2, 3, 8, 7))


def test_input_inside_a_structure() -> None:
    program = load_program(Nested(), ({"x": [torch.zeros(2, 8, 3), torch.zeros(2, 5)]},))
    assert [leaf.name for leaf in program.call.leaves] == ["inputs['x'][0]", "inputs['x'][1]"]
    check(program, (3, 12, 3), (3, 5))
    with pytest.raises(InputError) as caught:
        check(program, (3, 9, 3), (3, 5))
    assert "inputs['x'][0].shape[1] % 4" in str(caught.value)
    assert "inputs['x'][0].shape[1] = 9" in str(caught.value)


def test_batch_of_one_is_waived_where_the_model_agrees() -> None:
    config = hf.GPT2Config(vocab_size=99, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    program = load_program(hf.GPT2Model(config), {"input_ids": torch.zeros(2, 7, dtype=torch.long)})
    mentioning = [guard for guard in program.guards if ("input_ids", 0) in guard.sizes()]
    assert mentioning, "without a guard on the batch this test says nothing"
    check(program, (1, 7))
    check(program, (3, 9))


@pytest.mark.parametrize("batch", [1, 2])
def test_batch_of_one_is_refused_where_the_model_branches_on_it(batch: int) -> None:
    program = load_program(ByBatch(), torch.zeros(batch, 5, 3))
    check(program, (4, 6, 3))
    with pytest.raises(InputError, match=r"x: dimension 0 must not be 1; found x\.shape\[0\] = 1"):
        check(program, (1, 5, 3))


def test_waiver_leaves_other_sizes_and_other_guards_as_they_are() -> None:
    batch, length = make_guard('size("x", 0) >= 4'), make_guard('size("x", 1) != 1')
    waived, same = allow_batch_of_one((batch, length), X[0])
    assert [holds(waived, {("x", 0): size}) for size in (1, 2, 4)] == [True, False, True]
    assert same is length
    assert waived.text == batch.text


def test_rank_is_checked_before_any_size() -> None:
    with pytest.raises(InputError, match="model: x must have 3 dimensions; found 2"):
        checker([make_guard('size("x", 2) == 4')], X, "model")(torch.zeros(2, 4))


def test_nothing_to_check() -> None:
    checker([], (), "model")()


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("L['x'].size()[1] <= 64", "x: dimension 1 must be at most 64"),
        ("64 >= L['x'].size()[1]", "x: dimension 1 must be at most 64"),
        ("2 < L['x'].size()[0]", "x: dimension 0 must be above 2"),
        ("L['x'].size()[1] == min(64, L['x'].size()[1])", "x: dimension 1 must be at most 64"),
        ("min(64, L['x'].size()[1]) == L['x'].size()[1]", "x: dimension 1 must be at most 64"),
        ("L['x'].size()[2] != 1", "x: dimension 2 must not be 1"),
        ("L['x'].size()[1] % 8 == 0", "x.shape[1] % 8 == 0"),
        ("math.ceil(torch.sym_float(2*L['x'].size()[1]) / 3.0) <= 9", "ceil(float(2*x.shape[1]) / 3.0) <= 9"),
    ],
)
def test_sentences(source: str, text: str) -> None:
    (guard,) = from_export([source, source], [(X[0], torch.empty(0, 0, 0, device="meta"))])[:1]
    assert guard.text == text


def test_what_export_says_becomes_data_once() -> None:
    """A size that is a number is a condition; nothing comes twice."""
    fixed = [f'size("x", {dim}) == {size}' for dim, size in enumerate((2, 4, 6))]
    sources = ["L['x'].size()[0] == 2", "L['x'].size()[0] == 2"]
    guards = from_export(sources, [(X[0], torch.empty(2, 4, 6))])
    assert [guard.source for guard in guards] == fixed


def test_strict_export_names_its_inputs_by_number() -> None:
    sources = ["L['flat_args'][1].size()[0] % 4 == 0"]
    guards = from_export(sources, [(X[0], torch.empty(2, 4, 6))], flat=(True, X[0]))
    assert guards[0].source == 'size("x", 0) % 4 == 0'


@pytest.mark.parametrize("source", ["L['self'].size()[1] == 7", "L['x'].stride()[0] == 24", "open('x') == 1"])
def test_a_condition_that_cannot_be_checked_is_no_capture(source: str) -> None:
    with pytest.raises(CaptureError, match="cannot be checked at a call"):
        from_export([source], [(X[0], torch.empty(2, 4, 6))])


class Ranges(nn.Module):
    """Tables of positions that count by floats, as in Transformer-XL."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        distances = torch.arange(length - 1, -length, -1.0, device=x.device)
        ends = torch.arange(2 * length - 1.0, device=x.device)
        return x + distances[:length, None] + ends[length - 1 :, None]


def test_ends_of_ranges_may_be_floats() -> None:
    model = Ranges()
    program = load_program(model, torch.randn(2, 5, 6))
    check = checker(program.guards, program.call.leaves, "Ranges")
    assert any("sym_float" in guard.source for guard in program.guards)
    program.module(torch.randn(2, 5, 6))  # from its first run on it has code that can be traced
    compiled = torch.compile(
        lambda x: (check(x), program.module(x)[0])[1], backend="eager", fullgraph=True, dynamic=True
    )
    for length in (5, 8, 11):
        x = torch.randn(3, length, 6)
        assert all(holds(guard, {("x", dim): size for dim, size in enumerate(x.shape)}) for guard in program.guards)
        assert torch.equal(compiled(x), model(x))


def test_the_kind_of_numbers_has_to_stay() -> None:
    run = checker((), (Leaf("mask", 2, "bool"),), "Model")
    run(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(InputError, match=r"mask must be bool, as when the model was captured; found torch\.float32"):
        run(torch.ones(2, 3))


def test_a_condition_on_batch_and_length_stays_at_a_batch_of_one() -> None:
    joint = make_guard('size("x", 0) * size("x", 1) % 4 == 0')
    assert allow_batch_of_one((joint,), X[0]) == (joint,)


def test_sizes_of_a_guard() -> None:
    guard = Guard('size("a", 1) + size("b[0]", 2) == 2*size("a", 1)', "")
    assert guard.sizes() == (("a", 1), ("b[0]", 2))
