"""What pruning by priors did to each attention: counts, and what of it the lowering really leaves out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import sympy
from tabulate import tabulate


@dataclasses.dataclass(frozen=True)
class SitePruning:
    """The pruning of one site.

    ``scores`` are the admissible pairs of a query and a key, over all heads, before anything was cut; ``scores_kept``
    those that are left. ``computed`` is how many pairs the lowering computes, admissible or not, and ``unskipped`` how
    many of them are pruned. ``work`` is what one of those costs in multiply-accumulates for all batches, in every
    attention that uses the map. ``repeated`` is how many keys are there twice, once hidden, because the kernel is
    faster with full vectors, and ``repeated_work`` is what they cost.
    """

    site: str
    stack: str
    layer: int
    heads: int
    queries: int
    keys: int
    keys_kept: int
    scores: int
    scores_kept: int
    computed: int
    unskipped: int
    work: sympy.Expr
    repeated: int
    repeated_work: sympy.Expr
    lowering: str
    reason: str

    @property
    def scores_pruned(self) -> int:
        """How many admissible pairs were cut."""
        return self.scores - self.scores_kept

    @property
    def skipped_share(self) -> float:
        """The share of the pruned scores that the lowering does not compute; 1 where nothing was pruned."""
        return 1 - self.unskipped / self.scores_pruned if self.scores_pruned else 1.0


def unskipped_macs(pruned: Sequence[SitePruning]) -> sympy.Expr:
    """The multiply-accumulates for pruned scores that the lowering computes all the same, and for repeated keys.

    The work of a program less this is its algorithmic work.
    """
    return sympy.expand(sympy.Add(*(site.unskipped * site.work + site.repeated_work for site in pruned)))


def pruning_table(pruned: Sequence[SitePruning], form: str = "simple") -> str:
    """A table for people, in one of tabulate's forms."""
    rows = [
        [
            site.layer,
            site.site,
            f"{site.keys_kept}/{site.keys}",
            f"{site.scores_kept}/{site.scores}",
            f"{100 * site.skipped_share:.1f} %",
            site.lowering,
        ]
        for site in pruned
    ]
    headers = ["layer", "site", "keys kept", "scores kept", "pruned scores skipped", "lowering"]
    return tabulate(rows, headers=headers, tablefmt=form, disable_numparse=True)
