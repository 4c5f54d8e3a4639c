"""The factor of an attention's scores: 1/√ of the width of a head, wherever the model multiplies by it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import fx

from fxreuse.attention import AttentionSite
from fxreuse.errors import UnsupportedError
from fxreuse.finding.follow import arguments, aten, packet
from fxreuse.program import Program

from .fused import Fused
from .head_labels import Labels

_FACTORS = frozenset({aten.mul, aten.multiply, aten.div, aten.divide, aten.true_divide})
_NONLINEAR = frozenset({aten.tanh, aten.sigmoid, aten.exp, aten.relu})


def rescale(program: Program, site: AttentionSite, labels: Labels, heads: int) -> None:
    """Exchange the factors 1/√ of the old width of a head for those of the new one, in place.

    Looked at is everything that scores are made of and that has heads. A factor is exchanged where it is 1/√ of the
    width, or its root where queries and keys are both multiplied by it.

    Raises:
        UnsupportedError: where scores are multiplied by something else, or by a tensor.
    """
    old, new = site.head_dim, site.head_dim * site.heads // heads
    node = program.node(site.nodes.map)
    total = 1.0
    if site.fused:
        total = Fused.of(node).factor
        if math.isclose(total, old**-0.5, rel_tol=1e-5) and arguments(node)["scale"] is not None:
            node.update_kwarg("scale", new**-0.5)
    exchanged: dict[fx.Node, float] = {}
    behind = _behind_scores(program, site, labels)
    operands = {program.node(str(name)) for name in (site.nodes.query, site.nodes.key)}
    content = {n for operand in operands for n in _labelled_behind(operand, labels)} | _spine(behind, operands)
    for factor in behind:
        value = _value(factor, site, labels)
        if value is None or value == 1:
            continue
        total *= value if factor in content else 1.0
        power = next((p for p in (-0.5, -0.25) if math.isclose(value, old**p, rel_tol=1e-5)), None)
        if power is None:
            raise _refused(site, labels, factor, f"multiplies by {value:g}, which is not 1/√{old}")
        exchanged[factor] = power
    if total != 1 and not math.isclose(total, old**-0.5, rel_tol=1e-5):
        raise UnsupportedError(
            f"{site} cannot be split into another number of heads: its scores are multiplied by {total:g}, "
            f"which is not 1/√{old}, so the factor for heads of width {new} is not known."
        )
    for factor, power in exchanged.items():
        scale = new**power if packet(factor) in (aten.mul, aten.multiply) else new**-power
        factor.update_arg(1, scale)


def _behind_scores(program: Program, site: AttentionSite, labels: Labels) -> list[fx.Node]:
    """What the scores are made of and what has heads, up to a function that is not linear, in order of execution."""
    if site.fused:
        names = (site.nodes.query, site.nodes.key, site.nodes.mask)
        starts = [program.node(name) for name in names if name is not None]
    else:
        starts = [program.node(str(site.nodes.scores))]
    found = {node for start in starts for node in _labelled_behind(start, labels)}
    bent = {node for node in found if packet(node) in _NONLINEAR}
    return sorted(node for node in found if not bent or _is_before(node, bent, found))


def _is_before(node: fx.Node, bent: set[fx.Node], within: set[fx.Node]) -> bool:
    """Whether a factor acts on what is bent later, other than right before it (a cap)."""
    pending, first = [(user, True) for user in node.users if user in within], True
    seen: set[fx.Node] = set()
    while pending:
        user, first = pending.pop()
        if user in bent:
            return not first
        if user not in seen:
            seen.add(user)
            pending += [(next_user, False) for next_user in user.users if next_user in within]
    return False


def _labelled_behind(node: fx.Node, labels: Labels) -> Iterator[fx.Node]:
    """A node and all labelled ones that it is made of, as long as something labelled is in between."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current not in labels.layouts:
            continue
        yield current
        ahead = [operand for operand in current.all_input_nodes if operand not in seen]
        seen.update(ahead)
        pending.extend(ahead)


def _spine(nodes: list[fx.Node], operands: set[fx.Node]) -> set[fx.Node]:
    """What is made of the product of queries and keys."""
    after: set[fx.Node] = set()
    for node in nodes:
        if operands <= set(node.all_input_nodes) or any(operand in after for operand in node.all_input_nodes):
            after.add(node)
    return after


def _value(node: fx.Node, site: AttentionSite, labels: Labels) -> float | None:
    """What a node multiplies its first argument by; None where it does not."""
    if packet(node) is aten.baddbmm:
        alpha = arguments(node)["alpha"]
        if alpha != 1:
            raise _refused(site, labels, node, f"multiplies by {alpha:g} within the product")
        return None
    if packet(node) not in _FACTORS:
        return None
    factor = node.args[1]
    if isinstance(factor, (int, float)):
        return float(factor) if packet(node) in (aten.mul, aten.multiply) else 1 / factor
    other = factor.meta["val"] if isinstance(factor, fx.Node) else None
    if isinstance(other, torch.Tensor) and other.numel() == 1 and factor not in labels.flow.parameters:
        raise _refused(site, labels, node, "multiplies by a tensor of one element, whose value is not known")
    if other is not None and not isinstance(other, torch.Tensor):
        raise _refused(site, labels, node, "multiplies by a number that depends on sizes")
    return None


def _refused(site: AttentionSite, labels: Labels, node: fx.Node, reason: str) -> UnsupportedError:
    return labels.refusal(node, reason)
