"""Maps that look alike and are not the same thing are refused, with the sites and the difference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxreuse


class Attention(nn.Module):
    """Attention written out; ``form`` is how its map is made or treated."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (2, 4)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (self.heads(part(x)) for part in (self.query, self.key, self.value))
        if self.form == "transposed":
            context = (key @ query.mT / 2).softmax(-2).mT @ value
        else:
            attention_map = (query @ key.mT / 2).softmax(-1)
            if self.form == "written":
                attention_map[:, 0] *= 0.5
            context = attention_map @ value
        return x + self.out(context.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, *forms: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(form) for form in forms)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


X = torch.randn(2, 5, 8)


def test_one_layout_is_shared() -> None:
    small = fxreuse.apply(Model("plain", "plain"), "2x1", X)
    assert [decision.action for decision in fxreuse.describe(small).decisions] == ["lead", "follow"]


def test_a_transposed_map_is_not_shared_with_a_plain_one() -> None:
    with pytest.raises(fxreuse.UnsupportedError, match=r"layers\.1 .*layers\.0 .*axis -2 against .*axis -1"):
        fxreuse.apply(Model("plain", "transposed"), "2x1", X)


def test_a_map_that_is_written_into_is_not_shared() -> None:
    model = Model("written", "written").double().eval()
    with pytest.raises(fxreuse.UnsupportedError, match="writes into its attention map in place"):
        fxreuse.apply(model, "2x1", X.double())
    same = fxreuse.apply(model, "1x2", X.double())
    torch.testing.assert_close(same(X.double()), model(X.double()), rtol=0, atol=1e-12)


def test_a_stack_is_named_once() -> None:
    with pytest.raises(fxreuse.PlanError, match="twice"):
        fxreuse.apply(Model("plain", "plain"), "2x1 | 1x2", X)


class Skipped(nn.Module):
    """Layers that take positions beside the hidden states, and are skipped at random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Linear(8, 8)
        self.layers = nn.ModuleList(Attention("plain") for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = self.positions(x)
        for layer in self.layers:
            if not (self.training and torch.rand([]) < 1.0):
                x = layer(x + positions) + positions
        return x


def test_a_layer_that_cannot_be_skipped_surely_is_said_not_to_be() -> None:
    with pytest.warns(fxreuse.TrainingWarning):
        same = fxreuse.apply(Skipped().train(), "1x2", X)
    assert any(note.kind == "training" for note in fxreuse.describe(same).notes)


class Optional(nn.Module):
    """Takes its mask by ``**kwargs``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Model("plain", "plain")

    def forward(self, x: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return self.body(x * kwargs["scale"])


def test_arguments_by_name_beyond_the_signature() -> None:
    model = Optional().double().eval()
    inputs = {"x": X.double(), "scale": torch.full((2, 1, 1), 2.0, dtype=torch.float64)}
    same = fxreuse.apply(model, "1x2", inputs)
    torch.testing.assert_close(same(**inputs), model(**inputs), rtol=0, atol=1e-12)
    with pytest.raises(fxreuse.InputError, match="other"):
        same(**inputs, other=torch.ones(1))
