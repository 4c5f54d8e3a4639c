"""A rewritten model is called as the original is, and refuses what it was not captured for, by name."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import fxreuse

from .architectures import randomise
from .handwritten import Attention
from .running import assert_same

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@dataclasses.dataclass
class Output:
    """A result that torch knows nothing of until it is registered."""

    last: torch.Tensor
    parts: tuple[torch.Tensor, ...]


torch.export.register_dataclass(Output, serialized_type_name="tests.test_calling.Output")


class Layer(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(project(x)).transpose(1, 2) for project in (self.q, self.k, self.v))
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Every kind of argument; ``how`` says what kind of result."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(
        self,
        x: torch.Tensor,
        parts: dict[str, Any] | None = None,
        scale: float = 1.0,
        *extra: Any,
        how: str = "tensor",
        bias: torch.Tensor | None = None,
        **others: Any,
    ) -> Any:
        x = x * scale
        if parts is not None:
            x = x + parts["pair"][0] - parts["pair"][1] * parts["factor"]
        for layer in self.layers:
            x = layer(x)
        if bias is not None:
            x = x + bias
        if how == "tensor":
            return x
        if how == "dict":
            return {"last": x, "parts": [x + 1, (x + 2,)]}
        return Output(x, (x + 1, x + 2)) if how == "dataclass" else (x, None, "text", 3)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Model())


@pytest.fixture(scope="module")
def small(model: nn.Module) -> nn.Module:
    return fxreuse.apply(model, "1x*", {"x": torch.randn(2, 5, 8)})


@pytest.fixture(scope="module")
def structured(model: nn.Module) -> nn.Module:
    return fxreuse.apply(model, "1x*", {"x": torch.randn(2, 5, 8), "parts": parts(), "scale": 0.5})


def x() -> torch.Tensor:
    return torch.randn(2, 5, 8)


def parts(factor: Any = 2) -> dict[str, Any]:
    return {"pair": [torch.randn(2, 5, 8), torch.randn(2, 5, 8)], "factor": factor}


def refuses(small: nn.Module, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(fxreuse.InputError) as caught:
        small(*args, **kwargs)
    return str(caught.value)


def shape_of(signature: inspect.Signature) -> list[tuple[Any, ...]]:
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


def test_has_the_originals_signature(model: nn.Module, small: nn.Module) -> None:
    """Trainers read it to see which columns of a data set the model takes."""
    original, found = inspect.signature(model.forward), inspect.signature(small.forward)
    assert shape_of(found) == shape_of(original)
    assert list(found.parameters.values()) == list(original.parameters.values())


def test_by_position_and_by_keyword(model: nn.Module, structured: nn.Module) -> None:
    tensor, inner = x(), parts()
    expected = model(tensor, inner, 0.5)
    for found in (structured(tensor, inner, 0.5), structured(x=tensor, scale=0.5, parts=inner)):
        assert_same(found, expected)
    assert not torch.equal(expected, model(tensor, None, 0.5))


def test_a_default_may_be_said(small: nn.Module) -> None:
    tensor = x()
    expected = small(tensor)
    assert_same(small(tensor, None, 1.0, how="tensor", bias=None), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [("parts", {}), ("scale", 2.0), ("scale", 1), ("how", "dict"), ("bias", torch.zeros(8)), ("unheard_of", 1)],
)
def test_what_was_not_captured_is_refused(small: nn.Module, name: str, value: Any) -> None:
    said = refuses(small, x(), **{name: value})
    assert name in said
    assert "Model" in said


def test_a_surplus_positional_argument_is_refused(small: nn.Module) -> None:
    assert "*args" in refuses(small, x(), None, 1.0, "surplus")


def test_a_missing_argument_is_named(small: nn.Module, structured: nn.Module) -> None:
    assert "parts" in refuses(structured, x(), scale=0.5)
    with pytest.raises((TypeError, fxreuse.InputError), match=r"\bx\b"):
        small()


@pytest.mark.parametrize("value", [None, [1.0], "text", 3])
def test_something_else_than_a_tensor_is_refused(small: nn.Module, value: Any) -> None:
    assert "x must be a tensor" in refuses(small, value)


@pytest.mark.parametrize(
    "value",
    [
        {"pair": [torch.zeros(2, 5, 8)], "factor": 2},
        {"pair": (torch.zeros(2, 5, 8), torch.zeros(2, 5, 8)), "factor": 2},
        {"pair": [torch.zeros(2, 5, 8), torch.zeros(2, 5, 8)]},
        torch.zeros(2, 5, 8),
    ],
    ids=["too short", "a tuple", "a key missing", "a tensor"],
)
def test_another_structure_is_refused(structured: nn.Module, value: Any) -> None:
    assert "parts" in refuses(structured, x(), value, 0.5)


def test_a_leaf_of_another_kind_is_refused(structured: nn.Module) -> None:
    broken = parts()
    broken["pair"][1] = 7
    assert "parts['pair'][1]" in refuses(structured, x(), broken, 0.5)


@pytest.mark.parametrize("factor", [3, 2.0, True, None, torch.tensor(2)], ids=repr)
def test_a_constant_must_repeat(structured: nn.Module, factor: Any) -> None:
    assert "2" in refuses(structured, x(), parts(factor), 0.5)
    assert "0.5" in refuses(structured, x(), parts(), 0.25)


@pytest.mark.parametrize("shape", [(5, 8), (1, 2, 5, 8), (8,)])
def test_another_rank_is_refused(small: nn.Module, shape: tuple[int, ...]) -> None:
    said = refuses(small, torch.randn(shape))
    assert "x" in said
    assert "3" in said


def test_another_width_is_refused(small: nn.Module) -> None:
    said = refuses(small, torch.randn(2, 5, 9))
    assert "9" in said
    assert "8" in said


@pytest.mark.parametrize("how", ["dict", "dataclass", "tuple"])
def test_gives_back_the_originals_structure(model: nn.Module, how: str) -> None:
    inputs = {"x": x(), "how": how}
    small = fxreuse.apply(model, "1x*", inputs)
    other = {"x": torch.randn(3, 4, 8), "how": how}
    found, expected = small(**other), model(**other)
    if how == "dataclass":
        assert isinstance(found, Output)
        found, expected = (found.last, found.parts), (expected.last, expected.parts)
    assert_same(found, expected)
    if how == "tuple":
        assert found[1:] == (None, "text", 3)


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    torch.manual_seed(0)
    return randomise(hf.BertModel(hf.BertConfig(vocab_size=99, max_position_embeddings=32, **TINY)))


def test_what_the_configuration_says_may_be_said(bert: nn.Module) -> None:
    inputs = {"input_ids": torch.randint(3, 99, (2, 7))}
    small = fxreuse.apply(bert, "1x*", inputs)
    expected = bert(**inputs)
    for said in ({"return_dict": True}, {"use_cache": False}, {"output_attentions": False, "attention_mask": None}):
        found = small(**inputs, **said)
        assert type(found) is type(expected)
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    for name in ("return_dict", "output_attentions", "output_hidden_states", "use_cache"):
        value = name != "return_dict"
        assert name in refuses(small, **inputs, **{name: value})
    assert "attention_mask" in refuses(small, **inputs, attention_mask=torch.ones(2, 7))
    assert found["last_hidden_state"] is found[0]


def test_a_tuple_is_given_where_it_was_captured(bert: nn.Module) -> None:
    inputs = {"input_ids": torch.randint(3, 99, (2, 7)), "return_dict": False}
    small = fxreuse.apply(bert, "1x*", inputs)
    assert_same(small(**inputs), bert(**inputs))
    assert "return_dict" in refuses(small, **{**inputs, "return_dict": True})
    assert "return_dict" in refuses(small, input_ids=inputs["input_ids"])
