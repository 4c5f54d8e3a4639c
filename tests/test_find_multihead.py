"""torch's own attention in all its argument forms."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxreuse.attention import AttentionSites
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program

Tensor = torch.Tensor


class Multihead(torch.nn.Module):
    """One `torch.nn.MultiheadAttention`, and the arguments that it is called with."""

    def __init__(self, options: dict[str, Any], arguments: Callable[[Tensor], dict[str, Any]]) -> None:
        super().__init__()
        self.inner = torch.nn.MultiheadAttention(8, 2, **options)
        self.arguments = arguments

    def forward(self, x: Tensor) -> Any:
        named = {"query": x, "key": x, "value": x, "need_weights": False} | self.arguments(x)
        return self.inner(**named)


class All(torch.nn.Module):
    def __init__(self, cases: dict[str, torch.nn.Module]) -> None:
        super().__init__()
        self.cases = torch.nn.ModuleDict(cases)

    def forward(self, x: Tensor) -> list[Any]:
        return [case(x) for case in self.cases.values()]


def _later(x: Tensor, dim: int = 1) -> Tensor:
    """True for keys after the query, which are hidden."""
    at = torch.arange(x.shape[dim])
    return at[None, :] > at[:, None]


def _per_head(x: Tensor) -> Tensor:
    return torch.where(_later(x), -math.inf, 0.0).expand(2 * x.shape[0], -1, -1)


BATCH_FIRST = {"batch_first": True}

# options, arguments, then: fused, keys (of 5), mask
CASES: dict[str, tuple[dict[str, Any], Callable[[Tensor], dict[str, Any]], bool, int, str]] = {
    "plain": (BATCH_FIRST, lambda x: {}, True, 5, "none"),
    "weights": (BATCH_FIRST, lambda x: {"need_weights": True}, False, 5, "none"),
    "weights of every head": (
        BATCH_FIRST, lambda x: {"need_weights": True, "average_attn_weights": False}, False, 5, "none"
    ),
    "tokens first": ({}, lambda x: {}, True, 3, "none"),
    "tokens first, weights": ({}, lambda x: {"need_weights": True}, False, 3, "none"),
    "no bias": (BATCH_FIRST | {"bias": False, "dropout": 0.1}, lambda x: {}, True, 5, "none"),
    "bias_kv": (BATCH_FIRST | {"add_bias_kv": True}, lambda x: {}, True, 6, "none"),
    "bias_kv, weights": (BATCH_FIRST | {"add_bias_kv": True}, lambda x: {"need_weights": True}, False, 6, "none"),
    "zero_attn": (BATCH_FIRST | {"add_zero_attn": True}, lambda x: {}, True, 6, "none"),
    "other widths": (
        BATCH_FIRST | {"kdim": 4, "vdim": 6}, lambda x: {"key": x[..., :4], "value": x[..., :6]}, True, 5, "none"
    ),
    "boolean mask": (BATCH_FIRST, lambda x: {"attn_mask": _later(x)}, True, 5, "causal"),
    "boolean mask, weights": (
        BATCH_FIRST, lambda x: {"attn_mask": _later(x), "need_weights": True}, False, 5, "causal"
    ),
    "float mask": (
        BATCH_FIRST, lambda x: {"attn_mask": torch.where(_later(x), -math.inf, 0.0)}, True, 5, "causal"
    ),
    "mask for every head": (BATCH_FIRST, lambda x: {"attn_mask": _per_head(x)}, True, 5, "causal"),
    "causal flag": (BATCH_FIRST, lambda x: {"attn_mask": _later(x), "is_causal": True}, True, 5, "causal"),
    "padding": (BATCH_FIRST, lambda x: {"key_padding_mask": x[..., 0] > 9.0}, True, 5, "padding"),
    "padding, weights": (
        BATCH_FIRST, lambda x: {"key_padding_mask": x[..., 0] > 9.0, "need_weights": True}, False, 5, "padding"
    ),
    "padding and mask": (
        BATCH_FIRST, lambda x: {"key_padding_mask": x[..., 0] > 9.0, "attn_mask": _later(x)}, True, 5, "causal+padding"
    ),
    "one sequence": (BATCH_FIRST, lambda x: dict.fromkeys(("query", "key", "value"), x[0]), True, 5, "none"),
}  # fmt: skip


@functools.cache
def sites() -> AttentionSites:
    model = All({name: Multihead(*case[:2]) for name, case in CASES.items()}).eval()
    with torch.no_grad():
        return find(load_program(torch.export.export(model, (torch.randn(3, 5, 8),))))


@pytest.mark.parametrize("name", CASES)
def test_multihead_attention_in_all_its_argument_forms(name: str) -> None:
    *_, fused, keys, mask = CASES[name]
    (site,) = [site for site in sites() if site.path == f"cases.{name}.inner"]
    queries = 3 if name.startswith("tokens first") else 5
    batch = 1 if name == "one sequence" else 8 - queries
    assert (site.kind, site.heads, site.kv_heads, site.head_dim, site.value_dim) == ("self", 2, 2, 4, 4)
    assert (site.fused, site.map_shape, site.mask, site.bias) == (fused, (batch, 2, queries, keys), mask, "none")


def test_the_fast_path_of_torch_does_not_hide_attention() -> None:
    assert len(sites()) == len(CASES)
    assert sites().rejected == ()
