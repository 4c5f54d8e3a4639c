"""The ``recompute`` lowering: followers run the fused operator on the leader's queries and keys."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import fx

from fxreuse.attention import AttentionSite
from fxreuse.errors import UnsupportedError
from fxreuse.finding.flow import Flow
from fxreuse.finding.value_numbers import ValueNumbers
from fxreuse.masks.mask_proof import MaskProver
from fxreuse.modules import DropoutProbability
from fxreuse.nodes import inserting_before, is_effect, replace
from fxreuse.program import Program, module_path
from fxreuse.tree import free_path, place

from .affine import refusal
from .arrange import Arranger, Insert, Term, UnclearAxes
from .consumers import Consumer, fused_consumer, read_consumer
from .even_widths import even_widths
from .fused import OPERATOR, Fused
from .operands import Attention, Operands, fused_attention, unfused_attention, with_sink
from .pinned import is_pinned

_aten = torch.ops.aten


class Recomputer:
    """Rewrites the sites of a group in a program that the caller owns."""

    def __init__(self, program: Program) -> None:
        self.program = program

    @functools.cached_property
    def _flow(self) -> Flow:
        return Flow(self.program)

    @functools.cached_property
    def _numbers(self) -> ValueNumbers:
        return ValueNumbers(self.program)

    @functools.cached_property
    def _prover(self) -> MaskProver:
        return MaskProver(self.program.graph)

    def share(self, leader: AttentionSite, followers: Sequence[AttentionSite]) -> None:
        """Give every follower the leader's queries, keys, mask, bias and scale; values and dropout stay its own.

        Sound wherever the scores are affine in QKᵀ, scores = α·QKᵀ + β, which is what the fused operator computes with
        scale α and mask β. The leader, if unfused, becomes fused, too, as long as nobody reads its map as such. A map
        that is read by more than products with values, as one that the model returns, is the leader's for all of them.

        A query that sees no key at all, because all its scores were minus infinity, gives zeros, as the fused operator
        does, where a softmax gives NaN. Where they were finite, all of them the lowest number, the map is uniform, as
        the model's is.

        Raises:
            UnsupportedError: where the scores are not affine in QKᵀ, or something is done to a map that the operator
                does not do; what does it is named.
        """
        node = self.program.node(leader.nodes.map)
        if leader.fused and all(follower.fused for follower in followers):
            self._share_fused(node, [self.program.node(follower.nodes.map) for follower in followers])
            return
        try:
            attention = fused_attention(node) if leader.fused else unfused_attention(leader, node, self._flow)
            operands = Operands(leader, node, attention, self._prover)
            consumers = [(site, read) for site in followers for read in self._consumers(site, attention)]
            consumers += [] if leader.fused else [(leader, read) for read in self._own_consumers(leader, attention)]
            even_widths([self._attend(operands, site, consumer) for site, consumer in consumers])
        except UnclearAxes as unclear:
            raise refusal(leader, node, f"cannot tell the axes of its scores apart: {unclear}") from unclear
        for follower in followers:
            self._hand_over(leader, follower)

    def _share_fused(self, node: fx.Node, followers: Sequence[fx.Node]) -> None:
        """Fused followers of a fused leader, whose operands they take as they are."""
        leader, made = Fused.of(node), [node]
        for follower in followers:
            own = Fused.of(follower)
            with inserting_before(follower) as insert:
                made.append(
                    insert(
                        OPERATOR,
                        leader.query,
                        leader.key,
                        own.value,
                        leader.mask,
                        own.dropout_p,
                        leader.is_causal,
                        scale=leader.factor,
                        enable_gqa=leader.enable_gqa,
                    )
                )
            replace(follower, made[-1])
        even_widths(made)

    def _consumers(self, site: AttentionSite, attention: Attention) -> list[Consumer]:
        """What a site does with its map, if its map is that of the attention."""
        node = self.program.node(site.nodes.map)
        if site.fused:
            return [fused_consumer(node, attention.layout)]
        return [_read(self.program, site, node, attention, name) for name in site.nodes.contexts]

    def _own_consumers(self, leader: AttentionSite, attention: Attention) -> list[Consumer]:
        """What the leader does with its map; nothing where that needs the map itself, which then stays as it is."""
        try:
            return self._consumers(leader, attention)
        except UnsupportedError:
            return []

    def _attend(self, operands: Operands, site: AttentionSite, consumer: Consumer) -> fx.Node:
        """Turn a product of a map with values into a fused attention on the leader's operands. Returns that."""
        axes, node = operands.axes, consumer.node
        mask = operands.mask(self._empties(operands, site, consumer))
        arranger = Arranger((*operands.attention.layouts, *consumer.layouts), (*operands.terms, consumer.value))
        dropout_p = self._probability(node, consumer.dropout)
        with inserting_before(node) as insert:
            columns = (axes.batch, axes.heads, axes.keys, consumer.channels)
            value = arranger.arrange(insert, consumer.value, columns, full=True)
            query, key = (like(insert, operand, value) for operand in (mask.query, operands.key))
            added = mask.node
            if added is not None and added.meta["val"].is_floating_point():
                added = like(insert, added, value)
            value = self._scaled(insert, operands, arranger, consumer, value, of_values=True)
            if operands.attention.sink is not None:
                value = with_sink(insert, value)
            made = insert(
                OPERATOR, query, key, value, added, dropout_p, mask.is_causal, scale=operands.attention.number
            )
            result = self._scaled(insert, operands, arranger, consumer, made, of_values=False)
            rows = (axes.batch, axes.heads, axes.queries, consumer.channels)
            replace(node, arranger.arrange(insert, Term(result, rows), consumer.result))
        return made

    def _scaled(
        self, insert: Insert, operands: Operands, arranger: Arranger, consumer: Consumer, node: fx.Node, of_values: bool
    ) -> fx.Node:
        """Values, or else what attention made of them, times those factors of the map that they can take.

        A factor that is the same for all keys may as well be applied to the result, one that is the same for all
        queries to the values; dropout before or after it is the same.
        """
        axes = operands.axes
        own = axes.keys if of_values else axes.queries
        for factor in consumer.factors:
            pieces = {piece for dim in factor.term.layout for piece in arranger.pieces(dim)}
            over_keys, over_queries = (bool(pieces & set(arranger.pieces(dim))) for dim in (axes.keys, axes.queries))
            if over_keys and over_queries:
                reason = "needs the softmax to be all that is done to the map, but it is multiplied by a matrix"
                raise refusal(operands.site, factor.term.node, reason)
            if over_keys == of_values:
                layout = (axes.batch, axes.heads, own, ())
                by = arranger.arrange(insert, factor.term, layout) if factor.term.layout else factor.term.node
                node = factor.apply(insert, node, by)
        return node if of_values or consumer.number == 1 else insert(_aten.mul.Tensor, node, consumer.number)

    def _empties(self, operands: Operands, site: AttentionSite, consumer: Consumer) -> bool:
        """Whether a map is set to 0 where its scores were hidden, so that a query that sees no key gives zeros.

        Raises:
            UnsupportedError: where a map is set to 0 by anything but the one mask of its scores.
        """
        if not consumer.zeroed:
            return False
        attention = operands.attention
        hidden = [(self._numbers(s.condition.node), s.hides) for s in attention.selections]
        zeroed = {(self._numbers(condition), hides) for condition, hides in consumer.zeroed}
        masks = [addend for addend in attention.addends if addend.term.node not in self._flow.parameters]
        if len(hidden) != 1 or zeroed != set(hidden) or masks:
            raise refusal(site, consumer.zeroed[0][0], "cannot set a map to 0 but by the one mask of its scores")
        return True

    def _probability(self, node: fx.Node, dropout: float | fx.Node | torch.nn.Dropout) -> float | fx.Node:
        """The probability of a map's dropout as an argument of the fused operator, in the mode of the model."""
        if not isinstance(dropout, torch.nn.Dropout):
            return dropout
        path = free_path(self.program.module, module_path(node), "dropout_p")
        place(self.program.module, path, DropoutProbability(dropout.p).eval())
        with inserting_before(node) as insert:
            return insert(path)

    def _hand_over(self, leader: AttentionSite, follower: AttentionSite) -> None:
        """Whatever else reads a follower's map, as a model that returns it, reads the leader's.

        Raises:
            UnsupportedError: where the leader's is inside a fused operator.
        """
        if follower.fused:
            return
        node = self.program.node(follower.nodes.map)
        if not leader.fused:
            node.replace_all_uses_with(self.program.node(leader.nodes.map))
        elif _is_needed(node):
            reason = "does not compute the map of a fused leader, but the model also returns this one or writes it"
            raise refusal(follower, node, reason)


def _is_needed(node: fx.Node) -> bool:
    """Whether an output or an effect depends on a node."""
    readers = dict.fromkeys([node])
    pending = [node]
    while pending:
        current = pending.pop()
        if current.op == "output" or is_effect(current):
            return True
        pending += [user for user in current.users if user not in readers]
        readers.update(dict.fromkeys(current.users))
    return False


def _read(program: Program, site: AttentionSite, node: fx.Node, attention: Attention, name: str) -> Consumer:
    consumer = read_consumer(program, site, node, attention.layout, attention.axes.keys, name)
    if consumer.without_sink != (attention.sink is not None):
        raise refusal(site, consumer.node, "needs the whole map, and of a sink nothing")
    return consumer


def like(insert: Insert, node: fx.Node, value: fx.Node) -> fx.Node:
    """A tensor with the element type of another, where it may have one of its own."""
    if node.meta["val"].dtype == value.meta["val"].dtype and not is_pinned(node):
        return node
    return insert(_aten.type_as.default, node, value)
