"""Einsums of two values and weights become products of two tensors each."""

from __future__ import annotations

import torch
from torch import fx

from fxreuse.axes import sizes
from fxreuse.contractions import einsum_labels, is_attribute
from fxreuse.follow import arguments
from fxreuse.nodes import inserting_before, is_call, replace
from fxreuse.program import Program

from .steps import Pass

_EINSUM = torch.ops.aten.einsum.default


@Pass
def split_einsums(program: Program) -> None:
    """``einsum("bhqk,bkhc,hcd->bqd", map, v, w)`` becomes the product of map and values, and that of this and ``w``.

    Exact tier. Sound because a sum over several axes may be taken one axis after the other. It is done where the two
    values are summed over an axis that no weight has, as the keys are: that sum has to be taken in any order, and first
    is where it leaves least. So a map meets its values in a product of its own, as a fused attention computes it, and
    the weight that reads the attention is a projection like any other.
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
            wanted = set("".join((*(terms[other] for other in order[index:]), result)))
            last = index == len(order)
            after = result if last else "".join(dict.fromkeys(c for c in have + terms[place] if c in wanted))
            made = insert(_EINSUM, f"{have},{terms[place]}->{after}", [made, tensors[place]])
            have = after
    replace(node, made)
