"""Maps of one shape that are over different tokens are told apart; those over the same tokens are not."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from fxreuse.attention import AttentionSites
from fxreuse.errors import PlanError
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program
from fxreuse.passes.check_groups import check_groups
from fxreuse.program import Program

from .handwritten import Attention

Tensor = torch.Tensor
Over = Callable[["Layer", Tensor], Tensor]


class Layer(Attention):
    """Attention over some arrangement of a square image's tokens ``(batch, 4, 4, channels)``, with a residual."""

    def __init__(self, over: Over) -> None:
        super().__init__()
        self.over = over
        self.norm = torch.nn.LayerNorm(8)
        self.place = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def attend(self, x: Tensor) -> Tensor:
        """Over the second dimension of ``(batch, tokens, channels)``."""
        q, k, v = (self.split(p(x)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.over(self, self.norm(x))


def rows(m: Layer, x: Tensor) -> Tensor:
    return m.attend(x.flatten(0, 1)).view(x.shape)


def columns(m: Layer, x: Tensor) -> Tensor:
    y = x.transpose(1, 2)
    return m.attend(y.flatten(0, 1)).view(y.shape).transpose(1, 2)


def rows_by_permute(m: Layer, x: Tensor) -> Tensor:
    y = x.permute(0, 3, 1, 2).permute(0, 2, 3, 1).reshape(-1, 4, 8)
    return m.attend(y).unflatten(0, (-1, 4))


def rows_backwards(m: Layer, x: Tensor) -> Tensor:
    return rows(m, x.flip(2)).flip(2)


def rows_rolled(m: Layer, x: Tensor) -> Tensor:
    return rows(m, x.roll(1, 2)).roll(-1, 2)


def rows_rolled_by_hand(m: Layer, x: Tensor) -> Tensor:
    return rows(m, torch.cat([x[:, :, 3:], x[:, :, :3]], 2)).roll(-1, 2)


def rows_rolled_back(m: Layer, x: Tensor) -> Tensor:
    return rows(m, x.roll(1, 2).roll(-1, 2))


def rows_cut_and_joined(m: Layer, x: Tensor) -> Tensor:
    return rows(m, torch.cat([x[:, :, :1], x[:, :, 1:]], 2))


def rows_shuffled(m: Layer, x: Tensor) -> Tensor:
    return rows(m, x[:, :, torch.tensor([2, 0, 1, 3])])


def rows_after_convolution(m: Layer, x: Tensor) -> Tensor:
    return rows(m, m.place(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def windows(m: Layer, x: Tensor) -> Tensor:
    y = x.view(-1, 2, 2, 2, 2, 8).transpose(2, 3)
    return m.attend(y.reshape(-1, 4, 8)).view(y.shape).transpose(2, 3).reshape(x.shape)


def shifted_windows(m: Layer, x: Tensor) -> Tensor:
    return windows(m, x.roll((-1, -1), (1, 2))).roll((1, 1), (1, 2))


def padded_windows(m: Layer, x: Tensor) -> Tensor:
    """Padding by nothing is nothing."""
    return windows(m, F.pad(x, (0, 0, 0, 0, 0, 0)))


def windows_padded_before(m: Layer, x: Tensor) -> Tensor:
    return windows(m, F.pad(x, (0, 0, 1, 0, 0, 0))[:, :, :4])


def grid(m: Layer, x: Tensor) -> Tensor:
    """MaxViT: every second token."""
    y = x.view(-1, 2, 2, 2, 2, 8).permute(0, 2, 4, 1, 3, 5)
    return m.attend(y.reshape(-1, 4, 8)).view(y.shape).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def joined(m: Layer, x: Tensor) -> Tensor:
    """Batch and heads in one dimension."""
    q, k, v = (m.split(p(x.flatten(0, 1))).transpose(1, 2).flatten(0, 1) for p in (m.q, m.k, m.v))
    return ((q @ k.mT).softmax(-1) @ v).unflatten(0, (-1, 2)).transpose(1, 2).reshape(x.shape)


def joined_heads_first(m: Layer, x: Tensor) -> Tensor:
    q, k, v = (m.split(p(x.flatten(0, 1))).permute(2, 0, 1, 3).flatten(0, 1) for p in (m.q, m.k, m.v))
    return ((q @ k.mT).softmax(-1) @ v).unflatten(0, (2, -1)).permute(1, 2, 0, 3).reshape(x.shape)


OVERS = [
    rows, columns, rows_by_permute, rows_backwards, rows_rolled, rows_rolled_by_hand, rows_rolled_back,
    rows_cut_and_joined, rows_shuffled, rows_after_convolution, windows, shifted_windows, padded_windows,
    windows_padded_before, grid, joined, joined_heads_first,
]  # fmt: skip


@functools.cache
def captured() -> tuple[Program, AttentionSites]:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 2, 2), Channels(), *(Layer(over) for over in [*OVERS, rows]))
    with torch.no_grad():
        program = load_program(torch.export.export(model.eval(), (torch.randn(3, 3, 8, 8),)))
    return program, find(program)


def sites() -> AttentionSites:
    return captured()[1]


class Channels(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def differ(one: Over, other: Over) -> bool:
    first, second = (sites()[OVERS.index(over)] for over in (one, other))
    assert first.map_shape == second.map_shape
    assert first.mask_key == second.mask_key
    return first.tokens.differ(second.tokens)


@pytest.mark.parametrize("other", OVERS[1:10], ids=lambda over: over.__name__)
def test_lines_of_an_image(other: Over) -> None:
    assert differ(rows, other) == (other in (columns, rows_backwards, rows_rolled, rows_rolled_by_hand, rows_shuffled))


@pytest.mark.parametrize("other", OVERS[11:15], ids=lambda over: over.__name__)
def test_windows_of_an_image(other: Over) -> None:
    assert differ(windows, other) == (other is not padded_windows)


def test_windows_are_not_rows() -> None:
    assert differ(windows, columns)


def test_a_roll_is_a_roll_however_it_is_written() -> None:
    assert not differ(rows_rolled, rows_rolled_by_hand)


def test_batch_and_heads_are_not_heads_and_batch() -> None:
    assert differ(joined, joined_heads_first)


def test_many_layers_later_tokens_are_the_same() -> None:
    first, last = sites()[0], sites()[len(OVERS)]
    assert not first.tokens.differ(last.tokens)
    assert str(first.tokens) == str(last.tokens)


def test_a_group_over_different_tokens_is_refused_with_both_sites_named() -> None:
    program, found = captured()
    pair = [found[OVERS.index(over)] for over in (rows, columns)]
    with pytest.raises(PlanError, match=f"{pair[1]} .*{pair[0]} .*different tokens"):
        check_groups(program, pair, [0, 0])
    check_groups(program, [found[0], found[len(OVERS)]], [0, 0])
