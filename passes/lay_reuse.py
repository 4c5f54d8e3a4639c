"""One reuse pass of a plan, laid over a stack: heads, shared maps, wider values, and what is reinvested."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fxreuse.attention import AttentionSite
from fxreuse.finding.find import find
from fxreuse.layouts.feed_forward import find_feed_forward
from fxreuse.plans.plan import Reuse as Step
from fxreuse.plans.plan_options import DTYPES, Match
from fxreuse.program import Program

from .decisions import with_added
from .reuse import Reuse, reuse
from .split_heads import split_heads
from .widen_feed_forward import units_to_size, units_to_width, widen_feed_forward


def lay_reuse(program: Program, sites: Sequence[AttentionSite], leaders: Sequence[int], step: Step) -> Reuse:
    """Do to a stack what a pass of a plan says. Architecture tier.

    Arguments:
        program: a normalised program; it is not changed.
        sites: the sites of the stack, by layer.
        leaders: for every layer, the layer whose map it uses.
        step: the pass.

    Raises:
        PlanError: where groups, heads or widths do not fit the model.
        UnsupportedError: where the model has a form that the pass cannot rewrite; the reason is named.
    """
    program, sites = _with_heads(program, sites, step.groups.head_counts(len(sites)))
    dtype = None if step.dtype is None else DTYPES[step.dtype]
    done = reuse(program, sites, leaders, step.lowering, values=step.values, dtype=dtype)
    if step.ffn is None:
        return done
    added = _reinvest(program, done.program, sites, step)
    return dataclasses.replace(done, decisions=with_added(done.decisions, added), added=done.added | added)


def _with_heads(
    program: Program, sites: Sequence[AttentionSite], counts: Sequence[int | None]
) -> tuple[Program, Sequence[AttentionSite]]:
    """The program with as many heads in each layer as are asked for, and its sites."""
    for heads in dict.fromkeys(counts):
        members = [site for site, wanted in zip(sites, counts, strict=True) if wanted == heads != site.heads]
        if heads is None or not members:
            continue
        program = split_heads(program, members, heads)
        found = {str(site): site for site in find(program)}
        sites = [found[str(site)] for site in sites]
    return program, sites


def _reinvest(before: Program, after: Program, sites: Sequence[AttentionSite], step: Step) -> dict[str, int]:
    """Widen the feed-forward layers of the stack, in place. Returns what became larger."""
    found = find_feed_forward(after, [site.layer_path for site in sites])
    if isinstance(step.ffn, Match):
        aim, size = _target(before, sites, step, step.ffn)
        units = units_to_size(found, size - _size(after), aim)
    else:
        assert step.ffn is not None
        units = units_to_width(found, step.ffn)
    added = widen_feed_forward(after, found, units)
    after.module.recompile()
    after.check()
    return added


def _target(program: Program, sites: Sequence[AttentionSite], step: Step, match: Match) -> tuple[str, int]:
    """What is to be matched: its name, and its number of parameters."""
    if match.groups is None:
        return "before", _size(program)
    leaders = match.groups.leaders(len(sites))
    return f"under {match.groups}", _size(reuse(program, sites, leaders, step.lowering).program)


def _size(program: Program) -> int:
    """The number of parameters, tied ones once."""
    return sum({id(parameter): parameter.numel() for parameter in program.parameters().values()}.values())
