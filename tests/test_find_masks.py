"""Masks and biases of attentions written by hand: what they are called, and when two masks are the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from .handwritten import Attention, find_in


class Biased(Attention):
    """Scores with a table, a product with positions, and masks of all sorts, in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(9, 2)
        self.place = torch.nn.Parameter(torch.randn(5, 4))
        self.position = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(p(x)).transpose(1, 2) for p in (self.q, self.k, self.v))
        at = torch.arange(5)
        table = self.table((at[None, :] - at[:, None]).clamp(-4, 4) + 4).permute(2, 0, 1)
        scores = (1.0 - keep[:, None, None, :]) * -1e9 + (q @ k.mT + q @ self.position(self.place).mT) / 2.0
        scores = torch.where(at[None, :] <= at[:, None], scores + table, -math.inf)
        return scores.softmax(-1) @ v


def test_masks_and_biases_are_told_apart() -> None:
    _, (site,) = find_in(Biased(), (3, 5, 8), (3, 5))
    assert site.mask == "causal+padding"
    assert sorted(site.bias.split(" + ")) == ["relative position", "token-dependent position"]


class Masked(Attention):
    """Two attentions in a row whose masks are written differently."""

    def __init__(self, masks: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]) -> None:
        super().__init__()
        self.masks = masks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1])
        for mask in self.masks:
            q, k, v = (self.split(p(x)).transpose(1, 2) for p in (self.q, self.k, self.v))
            x = (mask(q @ k.mT, at).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return x


def _where(s: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return torch.where(at[None, :] <= at[:, None], s, -math.inf)


def _fill(s: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return s.masked_fill(~(at[:, None] >= at[None, :]), torch.finfo(s.dtype).min)


def _window(size: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda s, at: s.masked_fill((at[None, :] - at[:, None]).abs() > size, -math.inf)


@pytest.mark.parametrize(
    ("masks", "same"),
    [
        ([_where, _fill], True),
        ([_window(4096), _window(4096)], True),
        ([_window(4096), _window(4095)], False),
        ([_where, _window(2)], False),
        ([_where, lambda s, at: s], False),
        ([lambda s, at: s + 0.5 * at, lambda s, at: s + at * 0.5], True),
        ([lambda s, at: s + 0.5 * at, lambda s, at: 2 * (s + 0.5 * at)], False),
    ],
)
def test_masks_are_equal_if_they_are_provably_so(masks: list[Any], same: bool) -> None:
    one, other = find_in(Masked(masks))[1]
    assert (one.mask_key == other.mask_key) == same


def test_a_key_is_the_same_in_every_capture() -> None:
    once, again = (find_in(Masked([_where, _window(3)]))[1] for _ in range(2))
    assert [site.mask_key for site in once] == [site.mask_key for site in again]
