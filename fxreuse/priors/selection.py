"""Which scores and keys are pruned: Algorithms 1, 2 and 3 of FiAK as functions of |π|, with exact counts.

A ranking is over one layer, all its heads together. Of equal magnitudes, those of earlier heads, queries and keys are
kept. Only admissible pairs are counted and cut: under a causal mask a query never sees the keys behind it, and their
priors have no gradient. Fractions are taken as they are written; of n things at most that fraction is cut, ⌊k·n⌋.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import torch
from torch import Tensor

from ..errors import PlanError
from ..plans.plan_fiak import check_fractions, fraction


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is left of an attention: ``keys`` (keys), and ``scores`` (heads, queries, keys), both boolean.

    ``scores`` has one head where all heads are cut alike. No score of a key that is cut is left, nor one that is not
    admissible.
    """

    keys: Tensor
    scores: Tensor


def select(
    magnitude: Tensor,
    admissible: Tensor,
    *,
    scores: float = 0.0,
    keys: float = 0.0,
    block: int = 1,
    causal: bool = False,
    before: Tensor | None = None,
    where: str = "the attention",
) -> Kept:
    """Prune a layer by the magnitudes of its priors.

    With ``scores`` alone this is Algorithm 1, with ``keys`` alone Algorithm 3 (by |π_j| of a mixture, by S(j) of an
    admixture), with both Algorithm 2: keys first, then the fraction 1 − (1−k₁)/(1−k₂) of the scores that are left.

    Arguments:
        magnitude: |π|, (heads, queries, keys) of an admixture, with one head where all have the same, or (heads, keys)
            of a mixture.
        admissible: (queries, keys), True where a query may see a key.
        scores: the fraction of the admissible scores to cut, k₁; those of keys that are cut count.
        keys: the fraction of the keys to cut, k₂.
        block: the side of the square blocks by which scores are cut, ranked by |π| summed over a block. Blocks are
            counted in the keys that are left.
        causal: whether S(j) is divided by the number of queries that see key j, N − j + 1 with j from 1, and the first
            key, the only one that the first query sees, is protected.
        before: which scores an earlier step left, (heads or 1, queries, keys); all where it is left out. The others
            weigh nothing, are counted as cut, and stay cut. One comes back only where its query has no other key left
            and, since blocks are counted anew, where it is in a block that is left.
        where: the attention, for messages.

    Raises:
        PlanError: for fractions that cannot be, or that would leave a query without a key.

    >>> magnitude = torch.tensor([[[4.0, 1.0, 2.0], [5.0, 6.0, 3.0], [9.0, 7.0, 8.0]]])
    >>> kept = select(magnitude, torch.ones(3, 3, dtype=torch.bool), scores=0.5)
    >>> kept.scores.int().tolist()
    [[[1, 0, 0], [0, 1, 0], [1, 1, 1]]]
    """
    check_fractions(scores, keys)
    magnitude = magnitude.double()
    alive = admissible.unsqueeze(0) if before is None else admissible & before
    weight = importance(magnitude, admissible, causal, alive)
    weight = weight.masked_fill(~alive.any(0).any(0), -1.0)  # keys that are cut already go first
    left = prune_keys(weight, admissible, keys, causal, where)
    remaining = admissible[:, left]
    if magnitude.dim() == 2:
        return Kept(left, _spread(alive[..., left], left))
    share = 1 - (1 - fraction(scores)) / (1 - fraction(keys)) if scores else Fraction(0)
    cut = prune_scores if block == 1 else _BlockPruner(block)
    return Kept(left, _spread(cut(magnitude[..., left], remaining, share, where, alive[..., left]), left))


def importance(magnitude: Tensor, admissible: Tensor, causal: bool, alive: Tensor | None = None) -> Tensor:
    """How much each key is needed: |π_j| of a mixture, S(j) of an admixture, summed over heads.

    S(j) is the sum of |π_ij| over the queries that may see key j, divided by their number where ``causal`` (Algorithm
    2, step 3). With ``alive``, only the scores that are True there count.

    >>> lower = torch.ones(2, 2, dtype=torch.bool).tril()
    >>> importance(torch.tensor([[[1.0, 9.0], [3.0, 5.0]]]), lower, causal=True)
    tensor([2., 5.])
    """
    if magnitude.dim() == 2:
        return magnitude.sum(0)
    summed = (magnitude * (admissible if alive is None else alive)).sum((0, 1))
    return summed / admissible.sum(0).clamp_min(1) if causal else summed


def prune_keys(weight: Tensor, admissible: Tensor, share: float, causal: bool, where: str = "the attention") -> Tensor:
    """The keys that are left, (keys), after a share of those with the least weight is cut.

    Raises:
        PlanError: a query would have no key left.

    >>> prune_keys(torch.tensor([1.0, 3.0, 2.0, 4.0]), torch.ones(4, 4, dtype=torch.bool), 0.5, False).tolist()
    [False, True, False, True]
    """
    weight = weight.clone()
    if causal:
        weight[0] = math.inf
    kept = _largest(weight, weight.numel() - math.floor(fraction(share) * weight.numel()))
    blind = (admissible.any(1) & ~admissible[:, kept].any(1)).nonzero().flatten()
    if len(blind):
        raise PlanError(
            f"{where}: keys={share} leaves query {int(blind[0])} without any key that it may see; cut fewer keys"
        )
    return kept


def prune_scores(
    magnitude: Tensor,
    remaining: Tensor,
    share: Fraction,
    where: str = "the attention",
    alive: Tensor | None = None,
) -> Tensor:
    """The scores that are left, (heads, queries, keys), after a share of those with the least magnitude is cut.

    The best score of each query is reserved first; then the count is met exactly, unless fewer are ``alive``.

    Raises:
        PlanError: fewer are to be left than there are queries.
    """
    visible = remaining.expand(magnitude.shape)
    alive = visible if alive is None else visible & alive
    ranked = _below_others(magnitude, alive).masked_fill(~visible, -math.inf)
    rows = visible.any(-1)
    best = ranked.argmax(-1, keepdim=True)
    ranked = ranked.scatter(-1, best, math.inf).masked_fill(~visible, -math.inf)
    pairs = int(visible.sum())
    left = pairs - math.floor(share * pairs)
    if left < int(rows.sum()):
        raise PlanError(
            f"{where}: of {pairs} scores {left} would be left, fewer than the {int(rows.sum())} queries that need one "
            f"each; cut fewer scores"
        )
    return _largest(ranked.flatten(), left).reshape(ranked.shape) & (ranked >= 0)


def _below_others(magnitude: Tensor, alive: Tensor) -> Tensor:
    """Magnitudes, those that were cut before below zero, in their own order."""
    return torch.where(alive, magnitude, -1 / (1 + magnitude))


class _BlockPruner:
    """`prune_scores` in whole blocks: the magnitude of a block is the sum over its scores."""

    def __init__(self, block: int) -> None:
        self._block = block

    def __call__(self, magnitude: Tensor, remaining: Tensor, share: Fraction, where: str, alive: Tensor) -> Tensor:
        visible = remaining.expand(magnitude.shape)
        alive = visible & alive
        there, living = (block_sums(part.double(), self._block) > 0 for part in (visible, alive))
        weight, whole = (block_sums(magnitude * part, self._block) for part in (alive, visible))
        ranked = _below_others(torch.where(living, weight, whole), living).masked_fill(~there, -math.inf)
        reserved = self._reserved(ranked, visible)
        count = int(there.sum())
        left = count - math.floor(share * count)
        if left < int(reserved.sum()):
            raise PlanError(
                f"{where}: of {count} blocks of {self._block}×{self._block} scores {left} would be left, fewer than "
                f"the {int(reserved.sum())} that leave every query a key; cut fewer scores, or take smaller blocks"
            )
        ranked = ranked.masked_fill(reserved, math.inf)
        kept = _largest(ranked.flatten(), left).reshape(ranked.shape) & (ranked >= 0)
        return unblocked(kept, self._block, visible.shape) & visible

    def _reserved(self, ranked: Tensor, visible: Tensor) -> Tensor:
        """The best block of every row of blocks, and of every query that sees nothing there the best that it does."""
        reserved = torch.zeros_like(ranked, dtype=torch.bool)
        reserved.scatter_(-1, ranked.argmax(-1, keepdim=True), True)
        reserved &= ranked > -math.inf
        seen = unblocked(reserved, self._block, visible.shape) & visible
        for head, query in (visible.any(-1) & ~seen.any(-1)).nonzero().tolist():
            own = block_sums(visible[head, query].double().reshape(1, 1, -1), self._block)[0, 0] > 0
            if not (own & reserved[head, query // self._block]).any():
                best = ranked[head, query // self._block].masked_fill(~own, -math.inf).argmax()
                reserved[head, query // self._block, best] = True
        return reserved


def block_sums(values: Tensor, block: int) -> Tensor:
    """The sums over square blocks of the last two dimensions; those at the end may be smaller.

    >>> block_sums(torch.ones(3, 3), 2)
    tensor([[4., 2.],
            [2., 1.]])
    """
    queries, keys = values.shape[-2:]
    padded = torch.nn.functional.pad(values, (0, -keys % block, 0, -queries % block))
    return padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).sum((-1, -3))


def unblocked(blocks: Tensor, block: int, shape: torch.Size) -> Tensor:
    """Every block's value at all its elements."""
    wide = blocks.repeat_interleave(block, -1).repeat_interleave(block, -2)
    return wide[..., : shape[-2], : shape[-1]]


def _spread(scores: Tensor, keys: Tensor) -> Tensor:
    """Scores of the keys that are left among those of all keys."""
    whole = torch.zeros(*scores.shape[:-1], len(keys), dtype=torch.bool)
    whole[..., keys] = scores.cpu()
    return whole


def _largest(values: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest values are, the earlier one of equals first."""
    kept = torch.zeros(values.numel(), dtype=torch.bool)
    kept[values.cpu().argsort(descending=True, stable=True)[:count]] = True
    return kept
