"""Algorithms 1 to 3 as functions of |π|: exact counts, ties, admissible pairs, what is reserved and protected."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxreuse import PlanError
from fxreuse.priors.selection import block_sums, importance, prune_scores, select

fractions = st.integers(0, 99).map(lambda number: number / 100)


def everywhere(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, bool]:
    heads, length = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    values = draw(st.lists(st.integers(0, 5), min_size=heads * length**2, max_size=heads * length**2))
    causal = draw(st.booleans())
    admissible = everywhere(length, length)
    return (
        torch.tensor(values).double().reshape(heads, length, length),
        admissible.tril() if causal else admissible,
        causal,
    )


@given(cases(), fractions, fractions)
def test_counts_are_exact_and_every_query_keeps_its_best_pair(case, scores, keys):
    magnitude, admissible, causal = case
    scores = max(scores, keys) if scores else 0.0
    heads, length = len(magnitude), len(admissible)
    left = length - math.floor(Fraction(str(keys)) * length)
    try:
        kept = select(magnitude, admissible, scores=scores, keys=keys, causal=causal)
    except PlanError:
        remaining = math.ceil((1 - Fraction(str(scores))) * heads * int(admissible.sum()))
        assert scores > 0
        assert remaining < 2 * heads * length
        return
    assert int(kept.keys.sum()) == left
    assert kept.keys[0] or not causal
    remaining = admissible & kept.keys
    share = 1 - (1 - Fraction(str(scores))) / (1 - Fraction(str(keys))) if scores else Fraction(0)
    pairs = heads * int(remaining.sum())
    assert int(kept.scores.sum()) == (pairs - math.floor(share * pairs))
    assert not (kept.scores & ~remaining).any()
    best = magnitude.masked_fill(~remaining, -1).argmax(-1, keepdim=True)
    assert kept.scores.expand(magnitude.shape).gather(-1, best).all()


@given(cases(), fractions)
def test_what_is_cut_is_no_larger_than_what_is_kept_but_for_what_is_reserved(case, scores):
    magnitude, admissible, _ = case
    try:
        kept = prune_scores(magnitude, admissible, Fraction(str(scores)))
    except PlanError:
        return
    best = torch.zeros_like(kept).scatter(-1, magnitude.masked_fill(~admissible, -1).argmax(-1, keepdim=True), True)
    cut = magnitude[~kept & admissible]
    chosen = magnitude[kept & ~best]
    assert not len(cut) or not len(chosen) or cut.max() <= chosen.min()


def test_earlier_ones_of_equals_are_kept():
    kept = select(torch.ones(1, 3, 4), everywhere(3, 4), scores=0.5)
    assert kept.scores.int().tolist() == [[[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0]]]
    assert select(torch.ones(1, 3, 4), everywhere(3, 4), keys=0.5).keys.tolist() == [True, True, False, False]


def test_fractions_are_what_is_written():
    # 0.29 · 100 is 28.999999999999996 in floating point
    assert int(select(torch.rand(1, 1, 100), everywhere(1, 100), keys=0.29).keys.sum()) == 71


def test_the_importance_of_a_key_is_a_mean_over_the_queries_that_see_it_where_causal():
    magnitude = torch.rand(2, 5, 5).double()
    found = importance(magnitude, everywhere(5, 5).tril(), causal=True)
    expected = [sum(float(magnitude[h, i, j]) for h in range(2) for i in range(j, 5)) / (5 - j) for j in range(5)]
    torch.testing.assert_close(found, torch.tensor(expected).double())


def test_mixed_pruning_cuts_the_papers_fraction_of_what_the_keys_leave():
    kept = select(torch.rand(1, 10, 10), everywhere(10, 10), scores=0.7, keys=0.2)
    assert int(kept.keys.sum()) == 8
    assert int(kept.scores.sum()) == 30  # of 80 the fraction 1 − 0.3/0.8 = 0.625 is cut


def test_too_few_scores_for_the_queries():
    with pytest.raises(PlanError, match="of 16 scores 2 would be left, fewer than the 4 queries"):
        select(torch.rand(1, 4, 4), everywhere(4, 4), scores=0.9)


@pytest.mark.parametrize(("scores", "keys"), [(1.0, 0), (-0.1, 0), (0, 1), (0, -1), (float("nan"), 0), (True, 0)])
def test_fractions_are_at_least_0_and_below_1(scores, keys):
    with pytest.raises(PlanError, match="is the fraction to prune, at least 0 and below 1"):
        select(torch.rand(1, 4, 4), everywhere(4, 4), scores=scores, keys=keys)


def test_scores_below_keys_contradict_each_other():
    with pytest.raises(PlanError, match="a key that is pruned takes its scores with it"):
        select(torch.rand(1, 4, 4), everywhere(4, 4), scores=0.2, keys=0.5)


def test_a_query_without_any_key_is_an_error():
    window = everywhere(6, 6).tril().triu(-1)
    magnitude = torch.arange(6.0).flip(0).expand(1, 6, 6)
    with pytest.raises(PlanError, match="leaves query 4 without any key"):
        select(magnitude, window, keys=0.5, causal=True)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.booleans(), fractions)
def test_blocks_are_cut_whole_and_counted(queries, keys, block, causal, scores):
    keys = queries if causal else keys
    admissible = everywhere(queries, keys).tril() if causal else everywhere(queries, keys)
    magnitude = torch.rand(2, queries, keys).double()
    there = block_sums(admissible.double(), block) > 0
    try:
        kept = select(magnitude, admissible, scores=scores, block=max(block, 2), causal=causal).scores
    except PlanError:
        assert scores > 0
        return
    block = max(block, 2)
    there = block_sums(admissible.double(), block) > 0
    blocks = block_sums(kept.double(), block) > 0
    count = 2 * int(there.sum())
    assert int(blocks.sum()) == count - math.floor(Fraction(str(scores)) * count)
    whole = blocks.repeat_interleave(block, -1).repeat_interleave(block, -2)[..., :queries, :keys]
    assert torch.equal(kept, whole & admissible)
    assert kept.any(-1).all()


@st.composite
def steps(draw: st.DrawFn) -> tuple[tuple[torch.Tensor, torch.Tensor, bool], list[tuple[float, float]]]:
    case = draw(cases())
    found = []
    for _ in range(2):
        keys = draw(st.integers(0, 60)) / 100
        found.append((max(keys, draw(st.integers(0, 80)) / 100), keys))
    return case, found


@given(steps())
def test_what_is_cut_stays_cut_but_for_a_querys_only_key(case_and_steps):
    (magnitude, admissible, causal), ((scores, keys), (more_scores, more_keys)) = case_and_steps
    try:
        first = select(magnitude, admissible, scores=scores, keys=keys, causal=causal)
        trained = magnitude.flip(-1)
        second = select(trained, admissible, scores=more_scores, keys=more_keys, causal=causal, before=first.scores)
    except PlanError:
        return
    assert int(second.keys.sum()) == len(admissible) - math.floor(Fraction(str(more_keys)) * len(admissible))
    back = second.scores & ~first.scores
    alone = second.scores.sum(-1, keepdim=True) == 1
    assert not (back & ~alone).any()
    assert (second.scores.any(-1) | ~admissible.any(-1)).all()


@given(steps(), st.integers(2, 4))
def test_blocks_that_are_cut_stay_cut(case_and_steps, block):
    (magnitude, admissible, causal), ((scores, _), (more_scores, _)) = case_and_steps
    try:
        first = select(magnitude, admissible, scores=scores, causal=causal, block=block)
        second = select(
            magnitude.flip(-1), admissible, scores=more_scores, causal=causal, block=block, before=first.scores
        )
    except PlanError:
        return
    assert not (second.scores & ~first.scores).any()


def test_what_is_cut_weighs_nothing_in_the_importance_of_a_key():
    magnitude = torch.tensor([[[9.0, 1.0, 2.0], [9.0, 1.0, 2.0], [1.0, 4.0, 2.0]]])
    before = torch.tensor([[[True, True, True], [False, True, True], [False, True, True]]])
    # What is left of the keys weighs 9, 6 and 6.
    kept = select(magnitude, everywhere(3, 3), keys=0.34, before=before)
    assert kept.keys.tolist() == [True, True, False]
    assert kept.scores[0].tolist() == [[True, True, False], [False, True, False], [False, True, False]]


def test_a_query_that_loses_its_only_key_gets_the_best_of_the_others_back():
    magnitude = torch.tensor([[[1.0, 2.0, 3.0], [9.0, 9.0, 1.0], [9.0, 9.0, 1.0]]])
    before = torch.tensor([[[False, False, True], [True, True, False], [True, True, False]]])
    kept = select(magnitude, everywhere(3, 3), keys=0.34, before=before)
    assert kept.scores[0].tolist() == [[False, True, False], [True, True, False], [True, True, False]]
