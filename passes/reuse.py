"""Reuse of attention maps: one map for a group of layers (map reuse, ICLR 2022 and its study; Recycle-and-Distill)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from fxreuse.attention import AttentionSite
from fxreuse.errors import PlanError, UnsupportedError
from fxreuse.nodes import argument, remove_dead
from fxreuse.program import Program
from fxreuse.record import Decision
from fxreuse.tree import drop, reads

from .cut_projections import cut_projections
from .functional import may_alias
from .materialize import Materializer
from .recompute import Recomputer


@dataclasses.dataclass(frozen=True)
class Reuse:
    """What reuse did to a program: a decision per site, parameters removed (path → numel), buffers removed."""

    program: Program
    decisions: tuple[Decision, ...]
    removed: dict[str, int]
    buffers_removed: tuple[str, ...]


def reuse(program: Program, sites: Sequence[AttentionSite], leaders: Sequence[int], lowering: str) -> Reuse:
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

    Raises:
        PlanError: where a group's maps differ in shape or mask.
        UnsupportedError: where the lowering cannot express a site; the reason is named.
    """
    _check_groups(program, sites, leaders)
    program = program.copy()
    before = reads(program)
    groups: dict[int, list[int]] = {}
    for layer, leader in enumerate(leaders):
        groups.setdefault(leader, []).append(layer)
    decisions: dict[int, Decision] = {}
    for leader, members in groups.items():
        followers = [sites[layer] for layer in members if layer != leader]
        chosen, reason = choose_lowering(program, sites[leader], lowering) if followers else (None, "nobody shares it")
        if chosen == "materialize":
            Materializer(program).share(sites[leader], followers)
        elif chosen == "recompute":
            Recomputer(program).share(sites[leader], followers)
        for layer in members:
            decisions[layer] = _decision(sites[layer], sites[leader], bool(followers), chosen, reason)
    remove_dead(program.graph)
    cut = cut_projections(program, [sites[layer] for layer, leader in enumerate(leaders) if layer != leader])
    gone = before.keys() - reads(program).keys()
    drop(program, set(gone))
    program.module.recompile()
    program.check()
    parameters = {
        path: tensor.numel()
        for path, tensor in before.items()
        if path in gone and isinstance(tensor, torch.nn.Parameter)
    }
    buffers = tuple(sorted(gone - parameters.keys() - program.non_persistent))
    return Reuse(program, _with_removed(decisions, parameters | cut), parameters | cut, buffers)


def choose_lowering(program: Program, leader: AttentionSite, asked: str) -> tuple[str, str]:
    """The lowering of a group and the reason: as asked, or by the device that the model is on."""
    if asked != "auto":
        return asked, "as the plan says"
    device = next((tensor.device.type for tensor in reads(program).values()), "cpu")
    if device in ("cpu", "meta"):
        return "materialize", "on a CPU a stored map costs less than computing it again"
    if not leader.fused:
        return "materialize", "the model computes this map unfused"
    return "recompute", f"on {device} the fused kernel needs no map in memory"


def _check_groups(program: Program, sites: Sequence[AttentionSite], leaders: Sequence[int]) -> None:
    for layer, leader in enumerate(leaders):
        if layer == leader:
            continue
        follower, source = sites[layer], sites[leader]
        shapes = [[str(size) for size in site.map_shape] for site in (source, follower)]
        if shapes[0] != shapes[1]:
            raise PlanError(
                f"{follower} (layer {layer}) cannot use the map of {source} (layer {leader}): their maps differ in "
                f"shape, {'×'.join(shapes[1])} against {'×'.join(shapes[0])} (batch×heads×queries×keys). "
                "Choose groups within layers whose maps have one shape."
            )
        if source.mask_key != follower.mask_key:
            raise PlanError(
                f"{follower} (layer {layer}) cannot use the map of {source} (layer {leader}): they are masked "
                f"differently, {follower.mask!r} against {source.mask!r}. Layers by mask: {_by_mask(sites)}. "
                "Choose groups within layers of one mask, with leaders=… if they alternate."
            )
        layouts = [_layout(program, site) for site in (source, follower)]
        if layouts[0] != layouts[1]:
            raise UnsupportedError(
                f"{follower} (layer {layer}) cannot use the map of {source} (layer {leader}): the model lays them out "
                f"differently, {layouts[1]} against {layouts[0]}. Choose groups within layers of one layout."
            )
        for site in (source, follower):
            _check_not_written(program, site)
        if source.kind != follower.kind:
            raise UnsupportedError(f"{follower} is {follower.kind} attention, but {source} is {source.kind} attention.")


def _layout(program: Program, site: AttentionSite) -> str:
    """The axes of a site's map in memory, and which of them is the softmax's."""
    if site.fused:
        return "×".join(str(size) for size in site.map_shape) + ", softmax over axis -1"
    node = program.node(site.nodes.map)
    value = node.meta["val"]
    dim = argument(node, 1, "dim") % value.dim() - value.dim()
    return "×".join(str(size) for size in value.shape) + f", softmax over axis {dim}"


def _check_not_written(program: Program, site: AttentionSite) -> None:
    """A map that the model changes in place is not a value that others could read."""
    if site.fused:
        return
    aliases = [program.node(site.nodes.map)]
    for alias in aliases:
        for user in alias.users:
            schema = getattr(user.target, "_schema", None)
            if schema is None or user.args[:1] != (alias,):
                continue
            if schema.is_mutable:
                raise UnsupportedError(
                    f"{site}: the model writes into its attention map in place ({user.name}: {user.target}), so other "
                    "layers cannot share it. Write the change as a new tensor."
                )
            if may_alias(user) and user not in aliases:
                aliases.append(user)


def _by_mask(sites: Sequence[AttentionSite]) -> str:
    kinds: dict[str, list[str]] = {}
    for site in sites:
        kinds.setdefault(site.mask_key, []).append(str(site.layer))
    return " | ".join(",".join(layers) for layers in kinds.values())


def _decision(site: AttentionSite, leader: AttentionSite, shared: bool, lowering: str | None, reason: str) -> Decision:
    action = "keep" if not shared else "lead" if site is leader else "follow"
    name = str(leader) if action == "follow" else None
    return Decision(str(site), site.stack, site.layer, action, name, lowering, reason)


def _with_removed(decisions: dict[int, Decision], removed: dict[str, int]) -> tuple[Decision, ...]:
    """Each removed parameter under the decision of the follower that it belonged to, by the longest common path."""
    taken: dict[int, list[str]] = {}
    followers = [layer for layer, decision in decisions.items() if decision.action == "follow"]
    for path in removed:
        best = max(followers, key=lambda layer: _common(decisions[layer].site, path))
        taken.setdefault(best, []).append(path)
    return tuple(
        dataclasses.replace(decisions[layer], removed=tuple(sorted(taken.get(layer, ()))))
        for layer in sorted(decisions)
    )


def _common(one: str, other: str) -> int:
    count = 0
    for a, b in zip(one.replace("@", ".").split("."), other.split("."), strict=False):
        if a != b:
            break
        count += 1
    return count
