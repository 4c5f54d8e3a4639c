"""The fit of shared matrices and residuals, on trained weights and random ones, against rank and a plain SVD."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import residual_transformer as example
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxreuse.passes.fit_residuals import fit_residuals


def plain(weights: list[torch.Tensor], rank: int) -> float:
    """The squared error of the mean, a truncated SVD of what is left and a diagonal, the better of both orders."""
    mean = torch.stack(weights).mean(0)
    totals = []
    for diagonal_first in (True, False):
        total = 0.0
        for weight in weights:
            rest = weight - mean
            if diagonal_first:
                rest.diagonal().zero_()
            left, values, right = torch.linalg.svd(rest, full_matrices=False)
            rest = rest - left[:, :rank] * values[:rank] @ right[:rank]
            rest.diagonal().zero_()
            total += float(rest.square().sum())
        totals.append(total)
    return min(totals)


def fitted(weights: list[torch.Tensor], rank: int) -> float:
    """The squared error of the fit, from the matrices that it gives."""
    found = fit_residuals(weights, rank)
    return sum(
        float((weight - found.shared - one.dense()).square().sum())
        for weight, one in zip(weights, found.factors, strict=True)
    )


@pytest.fixture(scope="module")
def trained() -> list[list[torch.Tensor]]:
    """The weights of a small model after some training on real text, by place."""
    torch.manual_seed(0)
    text, _, characters = example.read_text()
    model = example.CharacterModel(characters, dim=32, layers=3, heads=2)
    example.train(model, text[:50_000], 60)
    names = ["query", "key", "value", "output", "fc1", "fc2"]
    return [[layer.get_submodule(name).weight.detach().double().t() for layer in model.layers] for name in names]


def test_on_a_trained_model(trained):
    ranks = (1, 2, 4, 8, 16)
    errors = {rank: sum(fitted(weights, rank) for weights in trained) ** 0.5 for rank in ranks}
    plains = {rank: sum(plain(weights, rank) for weights in trained) ** 0.5 for rank in ranks}
    assert all(less > more for less, more in pairwise(errors.values()))
    assert all(errors[rank] < plains[rank] for rank in ranks if rank >= 4)
    assert errors[16] < 0.97 * plains[16]


def test_the_table_in_the_documents():
    """The same of the numbers that docs/residual.md shows."""
    path = Path(example.__file__).parents[1] / "benchmarks" / "results" / "residual_example.json"
    rows = {row["rank"]: row for row in json.loads(path.read_text())["fit"]}
    assert all(rows[less]["fit"] > rows[more]["fit"] for less, more in pairwise(sorted(rows)))
    assert all(row["fit"] < row["plain"] for rank, row in rows.items() if rank >= 4)
    assert rows[16]["fit"] < 0.97 * rows[16]["plain"]


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(2, 7), st.integers(2, 7), st.booleans())
def test_random_matrices(seed, count, inputs, outputs, diagonal):
    """Never worse than the plain decomposition that it starts from; exact at full rank, and in contiguous factors."""
    torch.manual_seed(seed)
    weights = [torch.randn(inputs, outputs, dtype=torch.float64) for _ in range(count)]
    full = min(inputs, outputs)
    for rank in (1, full):
        found = fit_residuals(weights, rank, diagonal)
        assert all(factor.is_contiguous() for one in found.factors for factor in (one.a, one.b))
        assert all(one.a.shape == (inputs, rank) and one.b.shape == (rank, outputs) for one in found.factors)
        assert {one.d is None for one in found.factors} == {not diagonal}
    assert max(found.errors) < 1e-12
    mean = torch.stack(weights).mean(0)
    rest = [torch.linalg.svdvals(weight - mean)[1:].square().sum() for weight in weights]
    found = fit_residuals(weights, 1, diagonal)
    error = sum(
        (weight - found.shared - one.dense()).square().sum() for weight, one in zip(weights, found.factors, strict=True)
    )
    assert error <= sum(rest) + 1e-12
