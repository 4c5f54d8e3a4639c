"""The decisions of a reuse pass: what was done with each layer, and which parameters left or grew there."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from fxreuse.attention import AttentionSite
from fxreuse.record import Decision


def decision(site: AttentionSite, leader: AttentionSite, shared: bool, lowering: str | None, reason: str) -> Decision:
    """What was done with a site whose map comes from ``leader``; nobody else's does where it is not ``shared``."""
    action = "keep" if not shared else "lead" if site is leader else "follow"
    name = str(leader) if action == "follow" else None
    return Decision(str(site), site.stack, site.layer, action, name, lowering, reason)


def with_removed(decisions: Sequence[Decision], removed: Mapping[str, int]) -> tuple[Decision, ...]:
    """Each removed parameter under the decision of the follower that it belonged to."""
    taken = _nearest(removed, [one for one in decisions if one.action == "follow"])
    return tuple(
        dataclasses.replace(one, removed=tuple(sorted({*one.removed, *taken.get(one.site, ())}))) for one in decisions
    )


def with_added(decisions: Sequence[Decision], added: Mapping[str, int]) -> tuple[Decision, ...]:
    """Each parameter that grew under the decision of the layer that it belongs to."""
    taken = _nearest(added, decisions)
    return tuple(
        dataclasses.replace(one, added=tuple(sorted({*one.added, *taken.get(one.site, ())}))) for one in decisions
    )


def _nearest(paths: Collection[str], decisions: Sequence[Decision]) -> dict[str, list[str]]:
    """The paths by the site with which each has the longest beginning in common."""
    found: dict[str, list[str]] = {}
    for path in paths:
        best = max(decisions, key=lambda one: _common(one.site, path))
        found.setdefault(best.site, []).append(path)
    return found


def _common(one: str, other: str) -> int:
    count = 0
    for a, b in zip(one.replace("@", ".").split("."), other.split("."), strict=False):
        if a != b:
            break
        count += 1
    return count
