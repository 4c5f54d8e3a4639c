"""What generating one token costs, where every layer keeps keys and values of the tokens before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import sympy

from ..attention import AttentionSite
from ..cost_model.summary import Summary
from ..plans.plan import Plan, Reuse
from ..record import Record

#: The tokens of the past, and those that are new.
PAST, NEW = sympy.symbols("S n", integer=True, positive=True)
# What is done in a step of work that a whole sequence takes T⁰, T¹ and T² times.
_PER_POWER = {0: sympy.Integer(1), 1: NEW, 2: NEW * (NEW + PAST)}


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A step of ``n`` new tokens against a past of ``S``, before and after.

    ``macs`` are of one step, ``kv_bytes_per_token`` what all layers keep of one token of one sequence. Followers keep
    no keys: they use the map that their leader makes with its own.
    """

    macs_before: sympy.Expr
    macs_after: sympy.Expr
    kv_bytes_per_token_before: int
    kv_bytes_per_token_after: int

    def as_text(self) -> dict[str, Any]:
        """As data without expressions."""
        return {
            name: value if isinstance(value, int) else str(value) for name, value in dataclasses.asdict(self).items()
        }


def decoding(before: Summary, after: Summary, sites: Sequence[AttentionSite], record: Record | None) -> Decoding | None:
    """The cost of a decode step of a causal language model; None for any other model.

    A causal model's work has terms in T, which are done once for every new token, and terms in T² in its attentions,
    where every new token meets the past and the new ones.
    """
    causal = bool(sites) and all(site.kind == "self" and site.mask.startswith("causal") for site in sites)
    tokens = before.symbols.get("T")
    if not causal or tokens is None or before.relations or set(before.symbols) - {"B", "T"}:
        return None
    if not all(_by_token(summary.macs, tokens) for summary in (before, after)):
        return None
    items = {found.itemsize for found in before.counts.maps}
    if len(items) != 1:
        return None
    (size,) = items
    actions = {} if record is None else {decision.site: decision.action for decision in record.decisions}
    widths = _widths(record)
    kept_before = sum(site.kv_heads * (site.head_dim + site.value_dim) for site in sites) * size
    kept_after = 0
    for site in sites:
        follows = actions.get(str(site)) == "follow"
        values = site.kv_heads * site.value_dim * (widths.get(site.stack, 1) if follows else 1)
        kept_after += (values + (0 if follows else site.kv_heads * site.head_dim)) * size
    return Decoding(_step(before.macs, tokens), _step(after.macs, tokens), kept_before, kept_after)


def _widths(record: Record | None) -> dict[str, int]:
    """How many times wider the values of followers are, by stack."""
    if record is None:
        return {}
    steps = [step for step in Plan.of(record.plan).passes if isinstance(step, Reuse)]
    reused = (decision.stack for decision in record.decisions if decision.action in ("keep", "lead", "follow"))
    return dict(zip(dict.fromkeys(reused), (step.values for step in steps), strict=True))


def _by_token(macs: sympy.Expr, tokens: sympy.Symbol) -> bool:
    """Whether work is done token by token and pair by pair, and not by blocks of tokens."""
    return bool(macs.is_polynomial(tokens)) and sympy.degree(macs, tokens) <= max(_PER_POWER)


def _step(macs: sympy.Expr, tokens: sympy.Symbol) -> sympy.Expr:
    """The multiply-accumulates of a step, from those of a whole sequence of length T."""
    in_tokens = sympy.Poly(macs, tokens)
    return sympy.expand(sympy.Add(*(factor * _PER_POWER[power] for (power,), factor in in_tokens.terms())))
