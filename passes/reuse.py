"""Reuse of attention maps: one map for a group of layers (map reuse, ICLR 2022 and its study; Recycle-and-Distill)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from fxreuse.attention import AttentionSite
from fxreuse.errors import UnsupportedError
from fxreuse.layout import context_of
from fxreuse.nodes import is_call, remove_dead
from fxreuse.program import Program
from fxreuse.record import Decision
from fxreuse.tree import drop, reads

from .check_groups import check_groups
from .cut_projections import cut_projections
from .decisions import decision, with_added, with_removed
from .even_widths import even_widths
from .fused import OPERATOR
from .materialize import Materializer
from .recompute import Recomputer
from .widen_values import widen_values


@dataclasses.dataclass(frozen=True)
class Options:
    """How reuse is done, as a plan says it.

    ``lowering`` is ``"materialize"``, ``"recompute"`` or ``"auto"``, ``values`` how many times as wide the values of
    followers become, and ``dtype`` that of a stored map (None: that in which it is computed).
    """

    lowering: str = "auto"
    values: int = 1
    dtype: torch.dtype | None = None


@dataclasses.dataclass(frozen=True)
class Reuse:
    """What reuse did: a program, a decision per site, parameters removed and added (path → numel), buffers removed."""

    program: Program
    decisions: tuple[Decision, ...]
    removed: dict[str, int]
    added: dict[str, int]
    buffers_removed: tuple[str, ...]


def reuse(
    program: Program, sites: Sequence[AttentionSite], leaders: Sequence[int], options: Options = Options()
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
        options: lowering, widening of values, and the stored map's dtype.

    Raises:
        PlanError: where a group's maps differ in shape or mask.
        UnsupportedError: where the lowering cannot express a site; the reason is named.
    """
    check_groups(program, sites, leaders)
    program = program.copy()
    before = reads(program)
    followers = [sites[layer] for layer, leader in enumerate(leaders) if layer != leader]
    if options.dtype is not None:
        raise UnsupportedError("dtype= is not built yet.")
    decisions = _lower(program, sites, leaders, options)
    remove_dead(program.graph)
    removed = cut_projections(program, followers)
    added = widen_values(program, followers, options.values)
    even_widths(_fused_contexts(program, followers) if added else ())
    gone = before.keys() - reads(program).keys()
    drop(program, set(gone))
    program.module.recompile()
    program.check()
    parameters = {path for path in gone if isinstance(before[path], torch.nn.Parameter)}
    removed |= {path: tensor.numel() for path, tensor in before.items() if path in parameters}
    buffers = tuple(sorted(gone - parameters - program.non_persistent))
    return Reuse(program, with_added(with_removed(decisions, removed), added), removed, added, buffers)


def _lower(
    program: Program, sites: Sequence[AttentionSite], leaders: Sequence[int], options: Options
) -> list[Decision]:
    """Rewrite every group by the lowering that is asked for, or that suits it."""
    groups: dict[int, list[int]] = {}
    for layer, leader in enumerate(leaders):
        groups.setdefault(leader, []).append(layer)
    decisions: dict[int, Decision] = {}
    for leader, members in groups.items():
        followers = [sites[layer] for layer in members if layer != leader]
        chosen, reason = choose_lowering(program, sites[leader], options) if followers else (None, "nobody shares it")
        if chosen == "materialize":
            Materializer(program).share(sites[leader], followers)
        elif chosen == "recompute":
            Recomputer(program).share(sites[leader], followers)
        for layer in members:
            decisions[layer] = decision(sites[layer], sites[leader], bool(followers), chosen, reason)
    return [decisions[layer] for layer in sorted(decisions)]


def _fused_contexts(program: Program, followers: Sequence[AttentionSite]) -> list[fx.Node]:
    """The fused operators among what contracts the followers' values."""
    contexts = [context_of(program, site, index) for site in followers for index in range(len(site.nodes.values))]
    return [node for node in contexts if is_call(node, OPERATOR)]


def choose_lowering(program: Program, leader: AttentionSite, options: Options) -> tuple[str, str]:
    """The lowering of a group and the reason: as asked, or by the device that the model is on."""
    if options.lowering != "auto":
        return options.lowering, "as the plan says"
    if options.dtype is not None:
        return "materialize", "the plan gives the dtype of the stored map"
    device = next((tensor.device.type for tensor in reads(program).values()), "cpu")
    if device in ("cpu", "meta"):
        return "materialize", "on a CPU a stored map costs less than computing it again"
    if not leader.fused:
        return "materialize", "the model computes this map unfused"
    return "recompute", f"on {device} the fused kernel needs no map in memory"
