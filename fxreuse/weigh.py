"""The fiak passes of a plan, laid over a model: priors for every attention that computes a map."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .attention import AttentionSite, AttentionSites
from .errors import PlanError
from .passes.insert_priors import SitePrior, insert_priors
from .plans.plan import Plan, Reuse
from .plans.plan_fiak import Fiak
from .plans.stack_choice import choose_stack, choose_stack_of_self_attention
from .program import Program, get_attribute
from .record import Decision, Record


@dataclasses.dataclass(frozen=True)
class Weighed:
    """A program with priors, and what the record says of them."""

    program: Program
    priors: tuple[SitePrior, ...]
    decisions: tuple[Decision, ...]
    added: Mapping[str, int]


def weigh(program: Program, sites: AttentionSites, plan: Plan) -> Weighed:
    """Insert the priors that a plan asks for. Followers of a map get none: they use what their leader's prior prunes.

    Raises:
        PlanError: two passes are for one stack, or for none that there is.
        UnsupportedError: the scores of a site cannot be followed.
    """
    priors: list[SitePrior] = []
    for step in plan.passes:
        if not isinstance(step, Fiak):
            continue
        stack = choose_stack_of_self_attention(step, sites)
        if any(prior.stack == stack for prior in priors):
            raise PlanError(f"plan {str(plan)!r} gives the stack {stack} priors twice; give every stack one fiak pass")
        program, made = insert_priors(program, _leading(sites, stack, plan), step)
        priors += made
    decisions = tuple(
        Decision(prior.site, prior.stack, prior.layer, "weigh", added=(prior.parameter,), reason=str(prior.plan))
        for prior in priors
    )
    added = {prior.parameter: get_attribute(program.module, prior.parameter).numel() for prior in priors}
    return Weighed(program, tuple(priors), decisions, added)


def _leading(sites: AttentionSites, stack: str, plan: Plan) -> list[AttentionSite]:
    """The sites of a stack that compute a map of their own under the reuse passes of a plan."""
    stacks = {name: len(members) for name, members in sites.stacks.items()}
    chosen = dict(choose_stack(step, stacks) for step in plan.passes if isinstance(step, Reuse))
    leaders = chosen.get(stack, range(stacks[stack]))
    return [site for layer, site in enumerate(sites.stacks[stack]) if leaders[layer] == layer]


def with_priors(record: Record, weighed: Weighed) -> Record:
    """The record of a rewrite with its priors."""
    return dataclasses.replace(
        record, decisions=(*record.decisions, *weighed.decisions), added={**record.added, **weighed.added}
    )
