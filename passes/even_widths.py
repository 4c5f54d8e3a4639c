"""Give queries, keys and values of fused attentions one width, which the kernels without a map in memory need."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx

from fxreuse.nodes import inserting_before
from fxreuse.program import fixed_size

from .fused import Fused

_aten = torch.ops.aten


def even_widths(nodes: Iterable[fx.Node]) -> None:
    """Pad what is narrower in each of these fused attentions with zeros. Exact tier; works on the graph in place.

    Where the values have another width than the queries and keys, attention on a CPU falls back to a kernel that
    writes the whole map. Sound because zero channels of queries and keys add nothing to a score, whose scale is given
    as a number, and because the channels that zero values make are cut off. Queries and keys that several attentions
    share are padded once.
    """
    padded: dict[tuple[fx.Node, int], fx.Node] = {}
    for node in nodes:
        fused = Fused.of(node)
        width, own = (fixed_size(part.meta["val"].shape[-1]) for part in (fused.query, fused.value))
        if width is None or own is None or width == own:
            continue
        _name_scale(node, fused.factor)
        if own > width:
            for index, part in enumerate((fused.query, fused.key)):
                if (part, own) not in padded:
                    padded[part, own] = _padded(part, own - width)
                node.update_arg(index, padded[part, own])
        else:
            with inserting_before(node) as insert:
                node.update_arg(2, _with_zeros(insert, fused.value, width - own))
            _cut(node, width, own)


def _name_scale(node: fx.Node, scale: float) -> None:
    if len(node.args) > 6:
        node.update_arg(6, scale)
    else:
        node.update_kwarg("scale", scale)


def _padded(node: fx.Node, by: int) -> fx.Node:
    """A tensor with zero channels behind its own, made where the tensor is."""
    following = node.next
    with inserting_before(following) as insert:
        made = _with_zeros(insert, node, by)
    new = node.next
    while new is not following:
        new.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
        new = new.next
    return made


def _with_zeros(insert: Callable[..., fx.Node], node: fx.Node, by: int) -> fx.Node:
    """A tensor and zero channels. (`constant_pad_nd` on symbolic sizes fixes them.)"""
    one = insert(_aten.zeros_like.default, insert(_aten.slice.Tensor, node, -1, 0, 1))
    shape = [-1] * (node.meta["val"].dim() - 1)
    return insert(_aten.cat.default, [node, insert(_aten.expand.default, one, [*shape, by])], -1)


def _cut(node: fx.Node, width: int, to: int) -> None:
    """Every reader of a fused attention reads its first channels."""
    value = node.meta["val"]
    node.meta["val"] = torch.empty_like(value[..., :1]).expand(*value.shape[:-1], width)
    with inserting_before(node.next) as insert:
        made = insert(_aten.slice.Tensor, node, -1, 0, to)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
