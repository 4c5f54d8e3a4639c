"""Einsums of two values and weights become products of two tensors each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from fxreuse.finding.axes import sizes
from fxreuse.finding.contractions import einsum_labels, is_attribute
from fxreuse.finding.follow import arguments
from fxreuse.nodes import inserting_before, is_call, replace
from fxreuse.program import Program

from .steps import Pass

_aten = torch.ops.aten
_EINSUM = _aten.einsum.default


@Pass
def split_einsums(program: Program) -> None:
    """``einsum("bhqk,bkhc,hcd->bqd", map, v, w)`` becomes the product of map and values, and that of this and ``w``.

    Exact tier. Sound because a sum over several axes may be taken one axis after the other. It is done where the two
    values are summed over an axis that no weight has, as the keys are: that sum has to be taken in any order, and first
    is where it leaves least. A weight over whose axes nothing is summed is a factor. So a map meets its values in a
    product of its own, as a fused attention computes it, and the weight that reads the attention is a projection like
    any other.
    """
    for node in list(program.graph.nodes):
        if is_call(node, _EINSUM):
            _split(node)


def _split(node: fx.Node) -> None:
    named = arguments(node)
    tensors = list(named["tensors"])
    labels = einsum_labels(named["equation"], [len(sizes(tensor)) for tensor in tensors])
    values = [place for place, tensor in enumerate(tensors) if not is_attribute(tensor)]
    if labels is None or len(tensors) < 3 or len(values) != 2:
        return
    *terms, result = labels
    order = [*values, *(place for place in range(len(tensors)) if place not in values)]
    shared = set(terms[order[0]]) & set(terms[order[1]])
    if shared <= set("".join((*(terms[place] for place in order[2:]), result))):
        return
    made, have = tensors[order[0]], terms[order[0]]
    with inserting_before(node) as insert:
        for index, place in enumerate(order[1:], 2):
            term, tensor = terms[place], tensors[place]
            wanted = set("".join((*(terms[other] for other in order[index:]), result)))
            after = result if index == len(order) else "".join(dict.fromkeys(c for c in have + term if c in wanted))
            if index > 2 and set(term) <= set(have) == set(after):
                made = _weighted(insert, made, have, tensor, term)
                if have != after:
                    made = insert(_aten.permute.default, made, [have.index(label) for label in after])
            else:
                made = insert(_EINSUM, f"{have},{term}->{after}", [made, tensor])
            have = after
    replace(node, made)


def _weighted(insert: Callable[..., fx.Node], node: fx.Node, labels: str, weight: fx.Node, own: str) -> fx.Node:
    """A value times a weight over some of its axes, none of which is summed over."""
    if list(own) != sorted(own, key=labels.index):
        weight = insert(_aten.permute.default, weight, [own.index(label) for label in sorted(own, key=labels.index)])
    first = min(map(labels.index, own), default=len(labels))
    for place, label in enumerate(labels[first:]):
        if label not in own:
            weight = insert(_aten.unsqueeze.default, weight, place)
    return insert(_aten.mul.Tensor, node, weight)
