"""The ``materialize`` lowering: the leader stores its map, followers read it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import fx

from fxreuse.attention import AttentionSite
from fxreuse.errors import UnsupportedError
from fxreuse.finding.flow import Flow
from fxreuse.map_workspace import attention_map
from fxreuse.masks.mask_proof import MaskProver
from fxreuse.nodes import argument, inserting_before, is_call, replace
from fxreuse.program import Program

from .arrange import Insert, Term, UnclearAxes
from .fused import Fused, dropout_module
from .merge_readers import merge_readers
from .operands import Operands, unfused_attention
from .pinned import is_pinned

_aten = torch.ops.aten
_CONTRACTIONS = (_aten.matmul.default, _aten.bmm.default)


class _Map(NamedTuple):
    """A map as it is stored, and in the dtype of the scores again for what is no product with values."""

    stored: fx.Node
    wide: fx.Node


class Materializer:
    """Rewrites the sites of a group in a program that the caller owns.

    Arguments:
        program: the program.
        dtype: in which the map is stored and contracted with the values; None for that of the scores. The product has
            the values' own dtype again. A narrower dtype makes the result approximate, by design: every probability is
            rounded once, in bfloat16 to one part in 512 of itself.
    """

    def __init__(self, program: Program, dtype: torch.dtype | None = None) -> None:
        self.program = program
        self.dtype = dtype

    @functools.cached_property
    def _flow(self) -> Flow:
        return Flow(self.program)

    @functools.cached_property
    def _prover(self) -> MaskProver:
        return MaskProver(self.program.graph)

    def share(self, leader: AttentionSite, followers: Sequence[AttentionSite]) -> None:
        """Make the leader's map a node of the graph, and contract it with each follower's own values.

        What leader and followers do alike to the map before that (other than dropout) is done once.

        Raises:
            UnsupportedError: where a map that is to have another dtype does not meet the values in a plain product.
        """
        node = self.program.node(leader.nodes.map)
        shared = self._store_fused(node) if leader.fused else self._store(leader, node)
        for site in (leader, *followers):
            node = self.program.node(site.nodes.map)
            if site.fused:
                self._contract(node, shared.stored)
            else:
                self._read(site, node, shared)
        self._cast_as_the_leader(shared.wide, 1 + len(followers))
        merge_readers(shared.wide)

    def _cast_as_the_leader(self, shared: fx.Node, layers: int) -> None:
        """Where every layer casts the map to the dtype of its own queries, take that of the leader's for all.

        Queries of all layers have one dtype; a follower that asks its own would have to compute them for that alone.
        """
        order = {node: index for index, node in enumerate(self.program.graph.nodes)}
        casts = [user for user in shared.users if is_call(user, _aten.type_as.default) and user.args[0] is shared]
        if len(casts) != layers:
            return
        first, *others = sorted(casts, key=order.__getitem__)
        for cast in others:
            cast.args = first.args

    def _store_fused(self, node: fx.Node) -> _Map:
        """The map of a fused attention.

        A row that the mask leaves nothing of gives zeros, as the fused operator does, and not NaN.
        """
        fused = Fused.of(node)
        with inserting_before(node) as insert:
            key = self._per_query_head(node, fused.query, fused.key)
            options = (fused.mask, fused.is_causal, fused.factor, True, self.dtype)
            return self._map(node, insert(attention_map, fused.query, key, *options), fused.query)

    def _store(self, leader: AttentionSite, node: fx.Node) -> _Map:
        """The map of an unfused attention: in one call where its scores are α·QKᵀ + β, and as it is elsewhere."""
        if argument(node, 2, "dtype") is None and not is_pinned(node):
            try:
                return self._store_affine(leader, node)
            except (UnsupportedError, UnclearAxes):
                pass  # nothing reads what was made up to here; it goes with the dead nodes
        if self.dtype is None:
            return _Map(node, node)
        with inserting_before(node.next) as insert:
            stored = insert(_aten.to.dtype, node, self.dtype)
            return self._map(node.next, stored, node)

    def _store_affine(self, leader: AttentionSite, node: fx.Node) -> _Map:
        attention = unfused_attention(leader, node, self._flow)
        if attention.sink is not None:
            raise UnclearAxes("the map of a sink has a key more than the values")
        if any(selection.fill != -math.inf for selection in attention.selections):
            raise UnclearAxes(
                "a score that is replaced by a number that is finite has no gradient, one that it is added to has"
            )
        operands = Operands(leader, node, attention, self._prover)
        if operands.query.meta["val"].dtype != node.meta["val"].dtype:
            raise UnclearAxes("the scores are computed in another dtype than the map")
        mask = operands.mask(empty_to_zero=False)
        with inserting_before(node) as insert:
            options = (mask.node, mask.is_causal, attention.number, False, self.dtype)
            made = insert(attention_map, mask.query, operands.key, *options)
            stored = operands.arranger.arrange(insert, Term(made, operands.axes.map), attention.layout)
        return self._map(node, stored, operands.query)

    def _map(self, before: fx.Node, stored: fx.Node, like: fx.Node) -> _Map:
        if self.dtype is None:
            return _Map(stored, stored)
        with inserting_before(before) as insert:
            return _Map(stored, insert(_aten.type_as.default, stored, like))

    def _read(self, site: AttentionSite, node: fx.Node, shared: _Map) -> None:
        """Let the readers of an unfused map read the shared one."""
        if node is not shared.wide:
            made = (shared.stored, shared.wide)
            node.replace_all_uses_with(shared.wide, delete_user_cb=lambda user: user not in made)
        if self.dtype is not None:
            for name in site.nodes.contexts:
                self._narrow(site, self.program.node(name), shared)

    def _narrow(self, site: AttentionSite, context: fx.Node, shared: _Map) -> None:
        """Compute a product of a map with values in the dtype of the stored map."""
        weights, value = context.args[:2] if is_call(context, *_CONTRACTIONS) else (None, None)
        dropout = weights if isinstance(weights, fx.Node) and self._is_dropout(weights) else None
        if (weights if dropout is None else dropout.args[0]) is not shared.wide or not isinstance(value, fx.Node):
            raise UnsupportedError(
                f"{site}: dtype= needs a map that goes into a product with the values, through dropout at most, but "
                f"{context.name} ({context.target}) reads {weights or list(context.all_input_nodes)}. "
                "Leave dtype= out for this stack."
            )
        with inserting_before(context) as insert:
            narrow = shared.stored
            if dropout is not None:
                target = str(dropout.target) if dropout.op == "call_module" else dropout.target
                narrow = insert(target, shared.stored, *dropout.args[1:])
            made = self._product(insert, narrow, value)
        replace(context, made)

    def _is_dropout(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.program.module.get_submodule(str(node.target))) is torch.nn.Dropout
        return is_call(node, _aten.dropout.default)

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
            made = self._product(insert, dropped, value)
        replace(node, made)

    def _product(self, insert: Insert, weights: fx.Node, value: fx.Node) -> fx.Node:
        """weights · V in the dtype of the stored map, then in that of the values again."""
        if self.dtype is None:
            return insert(_aten.matmul.default, weights, value)
        made = insert(_aten.matmul.default, weights, insert(_aten.to.dtype, value, self.dtype))
        return insert(_aten.type_as.default, made, value)

    def _per_query_head(self, node: fx.Node, query: fx.Node, other: fx.Node) -> fx.Node:
        """Keys or values repeated for grouped query heads, where the fused operator did that."""
        if not Fused.of(node).enable_gqa:
            return other
        groups = query.meta["val"].shape[-3] // other.meta["val"].shape[-3]
        if groups == 1:
            return other
        with inserting_before(node) as insert:
            return insert(_aten.repeat_interleave.self_int, other, groups, -3)
