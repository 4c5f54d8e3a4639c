"""What the axes of an attention's scores are: heads, queries and keys, so that something can be added to them."""

from __future__ import annotations

import dataclasses
import itertools

from fxreuse.attention import AttentionSite
from fxreuse.errors import UnsupportedError
from fxreuse.finding.axes import Layout, Part
from fxreuse.finding.flow import Flow
from fxreuse.finding.follow import arguments
from fxreuse.finding.heads import fused_roles, score_roles
from fxreuse.finding.scores import Scores, find_scores, push
from fxreuse.finding.softmaxes import Softmax, softmax_of
from fxreuse.program import Program


@dataclasses.dataclass(frozen=True)
class ScoreAxes:
    """The layout of the scores of a site, every axis under a name of its own, and the parts that are of one role."""

    layout: Layout

    def of(self, role: str) -> tuple[Part, ...]:
        """The parts that are heads, queries or keys, outermost first."""
        return tuple(part for dim in self.layout for part in dim if part.source[0] == role)  # type: ignore[index]


def softmax_at(program: Program, site: AttentionSite) -> Softmax:
    """The softmax of an unfused site."""
    top = program.node(str(site.nodes.scores))
    for node in program.graph.nodes:
        found = softmax_of(node) if node.op == "call_function" else None
        if found is not None and found.scores is top:
            return found
    raise AssertionError(f"{site} has no softmax")  # it was found by it


def score_axes(program: Program, site: AttentionSite, flow: Flow) -> ScoreAxes:
    """The axes of what the softmax of a site normalises.

    Raises:
        UnsupportedError: there are more of them than pairs of queries and keys, as with an attention sink.
    """
    if site.fused:
        named = arguments(program.node(site.nodes.map))
        layout = fused_roles(named["query"], named["key"], bool(named.get("enable_gqa", False)), flow).layout
        return _named(site, layout, len(layout) - 1)
    softmax = softmax_at(program, site)
    scores = find_scores(softmax.scores, softmax.dim, flow)
    assert isinstance(scores, Scores), scores  # it was found by them
    layout = score_roles(scores.product, scores.query, flow).layout
    for operand, node in itertools.pairwise(scores.spine):
        after = push(node, operand, layout, flow)
        assert after is not None
        layout = after
    return _named(site, layout, softmax.dim)


def _named(site: AttentionSite, layout: Layout, dim: int) -> ScoreAxes:
    counts = itertools.count()

    def named(part: Part) -> Part:
        role = part.source or "batch"
        return dataclasses.replace(part, source=(role,) if role == "keys" else (role, next(counts)))

    found = ScoreAxes(tuple(tuple(named(part) for part in parts) for parts in layout))
    if found.layout[dim] != found.of("keys") or len(found.of("keys")) != 1:
        raise UnsupportedError(
            f"{site}: its softmax is over more than its keys, as with an attention sink, and a prior has an entry for "
            "every key; leave this stack out"
        )
    return found
