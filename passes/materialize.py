"""The ``materialize`` lowering: the leader stores its map, followers read it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fxreuse.attention import AttentionSite
from fxreuse.nodes import inserting_before, replace
from fxreuse.program import Program

from .fused import Fused, dropout_module

_aten = torch.ops.aten


class Materializer:
    """Rewrites the sites of a group in a program that the caller owns."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def share(self, leader: AttentionSite, followers: Sequence[AttentionSite]) -> None:
        """Make the leader's map a node of the graph, and contract it with each follower's own values."""
        map_node = self.program.node(leader.nodes.map)
        if leader.fused:
            map_node = self._store_map(map_node)
        for follower in followers:
            node = self.program.node(follower.nodes.map)
            if follower.fused:
                self._contract(node, map_node)
            else:
                node.replace_all_uses_with(map_node)

    def _store_map(self, node: fx.Node) -> fx.Node:
        """Replace a fused attention by softmax(scale · QKᵀ + mask) and its product with V. Returns the map.

        A row that the mask leaves nothing of gives zeros, as the fused operator does, and not NaN.
        """
        fused = Fused.of(node)
        with inserting_before(node) as insert:
            key = self._per_query_head(node, fused.query, fused.key)
            query = insert(_aten.mul.Tensor, fused.query, fused.factor)  # before the product: half precision is narrow
            scores = insert(_aten.matmul.default, query, insert(_aten.transpose.int, key, -2, -1))
            softmax = _aten.softmax.int
            if fused.is_causal:
                keep = self._lower_triangle(node, fused)
                scores = insert(_aten.masked_fill.Scalar, scores, insert(_aten.logical_not.default, keep), -torch.inf)
            if fused.mask is not None:
                softmax = _aten._safe_softmax.default
                if fused.mask.meta["val"].dtype == torch.bool:
                    hidden = insert(_aten.logical_not.default, fused.mask)
                    scores = insert(_aten.masked_fill.Scalar, scores, hidden, -torch.inf)
                else:
                    scores = insert(_aten.add.Tensor, scores, fused.mask)
            attention_map = insert(softmax, scores, -1)
        self._contract(node, attention_map)
        return attention_map

    def _contract(self, node: fx.Node, attention_map: fx.Node) -> None:
        """Replace a fused attention by dropout(map) · V with its own dropout and values."""
        fused = Fused.of(node)
        with inserting_before(node) as insert:
            value = self._per_query_head(node, fused.query, fused.value)
            dropped = attention_map
            path = dropout_module(self.program, node, fused.dropout_p)
            if path is not None:
                dropped = insert(path, attention_map)
            elif fused.dropout_p:
                dropped = insert(_aten.dropout.default, attention_map, fused.dropout_p, True)
            made = insert(_aten.matmul.default, dropped, value)
        replace(node, made)

    def _per_query_head(self, node: fx.Node, query: fx.Node, other: fx.Node) -> fx.Node:
        """Keys or values repeated for grouped query heads, where the fused operator did that."""
        if not Fused.of(node).enable_gqa:
            return other
        groups = query.meta["val"].shape[-3] // other.meta["val"].shape[-3]
        if groups == 1:
            return other
        with inserting_before(node) as insert:
            return insert(_aten.repeat_interleave.self_int, other, groups, -3)

    def _lower_triangle(self, node: fx.Node, fused: Fused) -> fx.Node:
        with inserting_before(node) as insert:
            sizes = [insert(_aten.sym_size.int, operand, -2) for operand in (fused.query, fused.key)]
            return insert(_aten.tril.default, insert(_aten.new_ones.default, fused.query, sizes, dtype=torch.bool))
