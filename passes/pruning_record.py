"""What pruning leaves of one attention: as tensors to add to scores, and as the counts of its record."""

from __future__ import annotations

from typing import NamedTuple

import sympy
import torch
from torch import fx

from fxreuse.priors.pruning import SitePruning
from fxreuse.priors.selection import Kept

from .insert_priors import SitePrior
from .skip_blocks import Skipping


class Work(NamedTuple):
    """What a site costs after pruning.

    ``filling`` is how many keys are gathered twice to fill the kernel's vectors, ``of_score`` what a score costs in
    each attention, and ``gathered`` what the projections of all gathered keys cost.
    """

    filling: int
    of_score: tuple[sympy.Expr, ...]
    gathered: sympy.Expr


def scores_like(scores: torch.Tensor, like: fx.Node) -> torch.Tensor:
    """Scores, (heads or 1, queries, keys), with the heads of what a prior adds to them."""
    value = like.meta["val"]
    return (scores[0] if value.dim() == 2 else scores.expand(len(value), *scores.shape[1:])).clone()


def cut_like(scores: torch.Tensor, like: fx.Node, dtype: torch.dtype) -> torch.Tensor:
    """What is added where scores are cut, for a prior: 0 to those that are kept, minus infinity to others."""
    kept = scores_like(scores, like)
    return torch.zeros(kept.shape, dtype=dtype).masked_fill_(~kept, -torch.inf)


def pruning_record(prior: SitePrior, kept: Kept, work: Work, skipping: Skipping | None) -> SitePruning:
    """The record of a pruned site.

    Arguments:
        prior: the prior that was taken out.
        kept: what is left of scores and keys.
        work: what it costs.
        skipping: how cut scores are skipped, if they are.
    """
    heads, scores = prior.heads, kept.scores[..., kept.keys]
    times = heads if len(scores) == 1 else 1
    count = int(scores.sum()) * times
    left = int(prior.admissible[:, kept.keys].sum()) * heads
    queries, columns = scores.shape[-2:]
    computed = heads * queries * (columns + work.filling) if skipping is None else skipping.pairs
    return SitePruning(
        site=prior.site,
        stack=prior.stack,
        layer=prior.layer,
        heads=heads,
        queries=prior.admissible.shape[0],
        keys=prior.admissible.shape[1],
        keys_kept=int(kept.keys.sum()),
        scores=int(prior.admissible.sum()) * heads,
        scores_kept=count,
        computed=computed,
        unskipped=left - count if skipping is None else 0,
        work=sympy.Add(*work.of_score),
        repeated=work.filling,
        repeated_work=_repeated(prior, kept, work),
        lowering="mask" if skipping is None else skipping.lowering,
        reason=_reason(not bool(kept.keys.all()), left > count, work.filling) if skipping is None else skipping.reason,
    )


def _repeated(prior: SitePrior, kept: Kept, work: Work) -> sympy.Expr:
    """What the keys that fill the kernel's vectors cost, in projections and in the attentions."""
    if not work.filling:
        return sympy.Integer(0)
    share = sympy.Rational(work.filling, int(kept.keys.sum()) + work.filling)
    pairs = prior.heads * prior.admissible.shape[0] * work.filling
    return sympy.expand(share * work.gathered + pairs * sympy.Add(*work.of_score))


def _reason(cuts_keys: bool, hides: bool, filling: int) -> str:
    keys = "keys are gathered before they are projected" if cuts_keys else "all keys are left"
    scores = f"{keys}; single scores are hidden by a mask" if hides else f"{keys}, and all their scores"
    return f"{scores}; {filling} more, hidden, fill the kernel's vectors" if filling else scores
