"""Reuse of attention maps: one map for a group of layers (map reuse, ICLR 2022 and its study; Recycle-and-Distill)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from fxreuse.attention import AttentionSite
from fxreuse.errors import UnsupportedError
from fxreuse.layouts.layout import context_of
from fxreuse.nodes import is_call, remove_dead
from fxreuse.program import Program
from fxreuse.record import Decision, Note
from fxreuse.tree import drop, reads

from .check_groups import check_groups
from .choose_lowering import choose_lowering
from .cut_projections import cut_projections
from .decisions import decision, with_added, with_removed
from .even_widths import even_widths
from .fused import OPERATOR
from .materialize import Materializer
from .recompute import Recomputer
from .still_computed import still_computed
from .widen_values import widen_values


@dataclasses.dataclass(frozen=True)
class Reuse:
    """What reuse did: a program, a decision per site, parameters removed and added (path → numel), buffers removed.

    ``notes`` name followers that save less than one expects.
    """

    program: Program
    decisions: tuple[Decision, ...]
    removed: dict[str, int]
    added: dict[str, int]
    buffers_removed: tuple[str, ...]
    notes: tuple[Note, ...] = ()


def reuse(
    program: Program,
    sites: Sequence[AttentionSite],
    leaders: Sequence[int],
    lowering: str = "auto",
    *,
    values: int = 1,
    dtype: torch.dtype | None = None,
) -> Reuse:
    """Let the followers of a stack use their leader's attention map. Architecture tier.

    The shared map is the softmax's value before dropout; each consumer keeps its own values, dropout and output
    projection. Followers lose queries, keys, and all that only they fed. Sound as a rewrite because a follower's map is
    replaced by a value of the same shape, under the same mask, that is computed before it; what then has no reader is
    dead. Two lowerings give the same function: ``materialize`` stores the map, ``recompute`` keeps the leader's queries
    and keys and runs the fused operator with each follower's own values.

    Arguments:
        program: a normalised program; it is not changed.
        sites: the sites of one stack, by layer.
        leaders: for every layer, the layer whose map it uses.
        lowering: ``"materialize"``, ``"recompute"``, or ``"auto"``.
        values: how many times as wide the values of followers become.
        dtype: that of a stored map; None for the one in which it is computed.

    Raises:
        PlanError: where a group's maps differ in shape or mask.
        UnsupportedError: where the lowering cannot express a site; the reason is named.
    """
    check_groups(program, sites, leaders)
    before = reads(program)
    program, decisions = _lowered(program, sites, leaders, lowering, dtype)
    followers = [sites[layer] for layer, leader in enumerate(leaders) if layer != leader]
    remove_dead(program.graph)
    removed = cut_projections(program, followers)
    added = widen_values(program, followers, values)
    even_widths(_fused_contexts(program, followers) if added else ())
    gone = before.keys() - reads(program).keys()
    drop(program, set(gone))
    program.module.recompile()
    program.check()
    parameters = {path for path in gone if isinstance(before[path], torch.nn.Parameter)}
    removed |= {path: tensor.numel() for path, tensor in before.items() if path in parameters}
    buffers = tuple(sorted(gone - parameters - program.non_persistent))
    notes = tuple(still_computed(program, followers))
    return Reuse(program, with_added(with_removed(decisions, removed), added), removed, added, buffers, notes)


def _lowered(
    program: Program,
    sites: Sequence[AttentionSite],
    leaders: Sequence[int],
    lowering: str,
    dtype: torch.dtype | None,
) -> tuple[Program, list[Decision]]:
    """A program in which the groups share their maps, and a decision for each layer.

    A lowering that was chosen gives way to the other one where it is refused. Where both are, what counts is what the
    first says.
    """
    chosen, reason = _choose(program, sites, leaders, lowering, dtype)
    try:
        return _lower(program.copy(), sites, leaders, chosen, reason, dtype)
    except UnsupportedError as refused:
        if lowering != "auto" or dtype is not None:
            raise
        refusal = refused
    other = "recompute" if chosen == "materialize" else "materialize"
    reason = f"{reason}, but {chosen} is refused here: {refusal}"
    try:
        return _lower(program.copy(), sites, leaders, other, reason, dtype)
    except UnsupportedError:
        raise refusal from None


def _choose(
    program: Program,
    sites: Sequence[AttentionSite],
    leaders: Sequence[int],
    lowering: str,
    dtype: torch.dtype | None,
) -> tuple[str, str]:
    """The lowering of a stack and the reason: as asked, or what suits it."""
    if lowering != "auto":
        return lowering, "as the plan says"
    if dtype is not None:
        return "materialize", "the plan gives the dtype of the stored map"
    if len(set(leaders)) == len(leaders):
        return "materialize", "nobody shares a map"
    return choose_lowering(program, sites, leaders)


def _lower(
    program: Program,
    sites: Sequence[AttentionSite],
    leaders: Sequence[int],
    lowering: str,
    reason: str,
    dtype: torch.dtype | None,
) -> tuple[Program, list[Decision]]:
    """Rewrite every group that has followers, in place; the program, and a decision for each layer."""
    lowerer = Recomputer(program) if lowering == "recompute" else Materializer(program, dtype)
    followers: dict[int, list[AttentionSite]] = {}
    for layer, leader in enumerate(leaders):
        if layer != leader:
            followers.setdefault(leader, []).append(sites[layer])
    for leader, members in followers.items():
        lowerer.share(sites[leader], members)
    return program, [
        decision(site, sites[leader], True, lowering, reason)
        if leader in followers
        else decision(site, site, False, None, "nobody shares it")
        for site, leader in zip(sites, leaders, strict=True)
    ]


def _fused_contexts(program: Program, followers: Sequence[AttentionSite]) -> list[fx.Node]:
    """The fused operators among what contracts the followers' values."""
    contexts = [context_of(program, site, index) for site in followers for index in range(len(site.nodes.values))]
    return [node for node in contexts if is_call(node, OPERATOR)]
