"""The ``recompute`` lowering: followers run the fused operator on the leader's queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fxreuse.attention import AttentionSite
from fxreuse.errors import UnsupportedError
from fxreuse.modules import DropoutProbability
from fxreuse.nodes import inserting_before, is_call, replace
from fxreuse.program import Program, module_path
from fxreuse.tree import free_path, place

from .affine import Affine, affine_scores
from .fused import OPERATOR, Fused

_CONTRACTIONS = (torch.ops.aten.matmul.default, torch.ops.aten.bmm.default)


class Recomputer:
    """Rewrites the sites of a group in a program that the caller owns."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def share(self, leader: AttentionSite, followers: Sequence[AttentionSite]) -> None:
        """Give every follower the leader's queries, keys, mask, bias and scale; values and dropout stay its own.

        Sound wherever the scores are affine in QKᵀ, scores = α·QKᵀ + β, which is what the fused operator computes with
        scale α and mask β.
        """
        node = self.program.node(leader.nodes.map)
        if leader.fused:
            fused = Fused.of(node)
            scores = Affine(fused.query, fused.key, fused.factor, fused.mask, fused.is_causal, fused.enable_gqa)
        else:
            scores = affine_scores(leader, node)
        for follower in followers:
            map_node = self.program.node(follower.nodes.map)
            if follower.fused:
                own = Fused.of(map_node)
                self._attend(map_node, scores, own.value, own.dropout_p)
            else:
                self._replace_contractions(follower, map_node, scores)

    def _attend(self, node: fx.Node, scores: Affine, value: fx.Node, dropout_p: object) -> None:
        with inserting_before(node) as insert:
            made = insert(
                OPERATOR,
                scores.query,
                scores.key,
                value,
                scores.bias,
                dropout_p,
                scores.is_causal,
                scale=scores.scale,
                enable_gqa=scores.enable_gqa,
            )
        replace(node, made)

    def _replace_contractions(self, follower: AttentionSite, map_node: fx.Node, scores: Affine) -> None:
        """Turn each product of an unfused follower's map with values into a fused attention."""
        for name in follower.nodes.contexts:
            context = self.program.node(name)
            weights = context.args[0]
            dropout_p: fx.Node | float = 0.0
            if isinstance(weights, fx.Node) and weights.op == "call_module":
                dropout = self.program.module.get_submodule(str(weights.target))
                if isinstance(dropout, torch.nn.Dropout):
                    dropout_p = self._probability(context, dropout.p)
                    weights = weights.args[0]
            if weights is not map_node or not is_call(context, *_CONTRACTIONS):
                raise UnsupportedError(
                    f"{follower}: lowering=recompute needs softmax, dropout and one product with the values, but "
                    f"{context.name} reads {weights}. Use lowering=materialize for this stack."
                )
            value = context.args[1]
            assert isinstance(value, fx.Node)
            self._attend(context, scores, value, dropout_p)

    def _probability(self, context: fx.Node, p: float) -> fx.Node:
        path = free_path(self.program.module, module_path(context), "dropout_p")
        place(self.program.module, path, DropoutProbability(p).eval())
        with inserting_before(context) as insert:
            return insert(path)
