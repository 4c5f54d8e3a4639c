"""The matrices that a projection is made of: one, or those of queries, keys and values where they are fused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..attention import AttentionSite
from ..layouts.layout import push
from ..layouts.projections import Projection, hints, is_move, read_projection
from ..program import Program

ROLES = ("query", "key", "value")


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One matrix of a projection: what it makes (``query``, ``key``, ``value``, or nothing of them: empty).

    ``features`` are the output features of the projection that it makes, in order, and ``rows`` their indices in the
    parameter as the model was captured.
    """

    role: str
    features: torch.Tensor
    rows: torch.Tensor


def operands_of(program: Program, sites: Iterable[AttentionSite]) -> dict[str, frozenset[fx.Node]]:
    """The operands of some attentions by their roles, as far as the program still has them."""
    known = {node.name: node for node in program.graph.nodes}
    names: dict[str, list[str | None]] = {role: [] for role in ROLES}
    for site in sites:
        names["query"].append(site.nodes.query)
        names["key"].append(site.nodes.key)
        names["value"] += site.nodes.values
    return {role: frozenset(known[name] for name in found if name in known) for role, found in names.items()}


def parts_of(program: Program, projection: Projection, operands: Mapping[str, frozenset[fx.Node]]) -> tuple[Part, ...]:
    """The matrices of a projection.

    Which of its output features make queries, which keys and which values is read off the graph: their indices are
    pushed through the views behind the projection, up to the first operator that is none. Where features make several
    of them, or none, the projection is one matrix.

    Arguments:
        program: a normalised program.
        projection: one of its projections.
        operands: the operands of the attentions in its layer, as `operands_of` gives them.
    """
    width = len(projection.rows)
    ways = {role: _way_back(program, targets) for role, targets in operands.items()}
    reached = [role for role in ROLES if projection.result in ways.get(role, ())]
    whole = torch.arange(width)
    if len(reached) < 2:
        return (Part(reached[0] if reached else "", whole, projection.rows),)
    features = {role: _reaching(projection, ways[role], operands[role]) for role in reached}
    found = torch.cat([features[role] for role in reached])
    if len(found) != width or len(found.unique()) != width:
        return (Part("", whole, projection.rows),)
    return tuple(Part(role, features[role], projection.rows[features[role]]) for role in reached)


def _way_back(program: Program, targets: Iterable[fx.Node]) -> set[fx.Node]:
    """Every node from the nearest projections to some operands, both included."""
    pending, seen = list(targets), set(targets)
    while pending:
        node = pending.pop()
        if read_projection(program, node) is not None:
            continue
        ahead = [operand for operand in node.all_input_nodes if operand not in seen]
        seen.update(ahead)
        pending.extend(ahead)
    return seen


def _reaching(projection: Projection, way: set[fx.Node], operands: frozenset[fx.Node]) -> torch.Tensor:
    """The output features that get to some operands, in ascending order."""
    shape = hints(projection.result.meta["val"])
    features = torch.arange(shape[projection.feature])
    start: Any = features.reshape(-1, *[1] * (len(shape) - projection.feature - 1)).expand(shape)
    found: list[torch.Tensor] = []
    pending: list[tuple[fx.Node, Any]] = [(projection.result, start)]
    while pending:
        node, indices = pending.pop()
        users = [user for user in node.users if user in way]
        moves = [user for user in users if is_move(user) and user.args[0] is node]
        if isinstance(indices, torch.Tensor) and (node in operands or len(moves) < len(users)):
            found.append(indices.unique())
        pending += [(user, push(user, (indices, indices))[1]) for user in moves]
    return torch.cat(found).unique()


def contiguous(features: torch.Tensor) -> tuple[int, int] | None:
    """First and last-but-one index of features that follow one another; None where they do not.

    >>> contiguous(torch.arange(4, 8)), contiguous(torch.tensor([0, 2]))
    ((4, 8), None)
    """
    first = int(features[0])
    whole = torch.equal(features, torch.arange(first, first + len(features)))
    return (first, first + len(features)) if whole else None


def in_order(parts: Sequence[Part]) -> bool:
    """Whether the parts follow one another, each without gaps.

    >>> in_order([Part("key", torch.arange(2), torch.arange(2)), Part("value", torch.arange(2, 5), torch.arange(2, 5))])
    True
    """
    return torch.equal(torch.cat([part.features for part in parts]), torch.arange(sum(len(p.features) for p in parts)))
