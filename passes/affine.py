"""Read unfused scores as α·QKᵀ + β, the form that a fused attention computes."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from fxreuse.attention import AttentionSite
from fxreuse.errors import UnsupportedError
from fxreuse.nodes import argument, inserting_before, is_call

_aten = torch.ops.aten
_PRODUCTS = (_aten.matmul.default, _aten.bmm.default)


@dataclasses.dataclass(frozen=True)
class Affine:
    """scores = scale · query · keyᵀ + bias, with ``query`` (…, queries, width) and ``key`` (…, keys, width)."""

    query: fx.Node
    key: fx.Node
    scale: float
    bias: fx.Node | None
    is_causal: bool = False
    enable_gqa: bool = False


def affine_scores(site: AttentionSite, softmax: fx.Node) -> Affine:
    """The affine form of an unfused site's scores.

    Followed are products, sums with one term that has no product, and factors that are numbers.

    Raises:
        UnsupportedError: where the scores are anything else (a tanh soft-cap, say); the operator is named.
    """
    scores = softmax.args[0]
    assert isinstance(scores, fx.Node)
    scale, bias = 1.0, None
    node = scores
    while not is_call(node, *_PRODUCTS):
        if is_call(node, _aten.baddbmm.default):
            alpha, beta = argument(node, 4, "alpha", 1), argument(node, 3, "beta", 1)
            bias = _plus(softmax, bias, _times(softmax, node.args[0], scale * beta))  # type: ignore[arg-type]
            return _product(site, softmax, node.args[1], node.args[2], scale * alpha, bias)  # type: ignore[arg-type]
        if is_call(node, _aten.mul.Tensor, _aten.mul.Scalar) and isinstance(node.args[1], (int, float)):
            scale *= node.args[1]
        elif is_call(node, _aten.div.Tensor, _aten.div.Scalar) and isinstance(node.args[1], (int, float)):
            scale /= node.args[1]
        elif is_call(node, _aten.add.Tensor):
            node, added = _split_sum(site, node)
            bias = _plus(softmax, bias, _times(softmax, added, scale))
            continue
        else:
            raise _refusal(site, node, "the scores are not affine in the product of queries and keys")
        node = node.args[0]  # type: ignore[assignment]
    return _product(site, softmax, node.args[0], node.args[1], scale, bias)  # type: ignore[arg-type]


def _product(
    site: AttentionSite, softmax: fx.Node, query: fx.Node, transposed: fx.Node, scale: float, bias: fx.Node | None
) -> Affine:
    if query.meta["val"].dim() != transposed.meta["val"].dim():
        raise _refusal(site, transposed, "queries and keys differ in rank")
    with inserting_before(softmax) as insert:
        return Affine(query, insert(_aten.transpose.int, transposed, -2, -1), scale, bias)


def _split_sum(site: AttentionSite, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The term of a sum that leads to the product of queries and keys, and the other one."""
    if argument(node, 2, "alpha", 1) != 1:
        raise _refusal(site, node, "a term of the sum has a factor of its own (alpha)")
    terms = [term for term in node.args[:2] if isinstance(term, fx.Node)]
    leading = [term for term in terms if _leads_to_product(term, node.meta["val"].shape)]
    if len(terms) != 2 or len(leading) != 1:
        raise _refusal(site, node, "which term of the sum is the product of queries and keys is not plain")
    return leading[0], next(term for term in terms if term is not leading[0])


def _leads_to_product(node: fx.Node, shape: torch.Size) -> bool:
    while is_call(node, _aten.mul.Tensor, _aten.div.Tensor, _aten.mul.Scalar, _aten.div.Scalar, _aten.add.Tensor):
        node = node.args[0]  # type: ignore[assignment]
    return is_call(node, *_PRODUCTS, _aten.baddbmm.default) and len(node.meta["val"].shape) == len(shape)


def _times(before: fx.Node, node: fx.Node, factor: float) -> fx.Node:
    if factor == 1:
        return node
    with inserting_before(before) as insert:
        return insert(_aten.mul.Tensor, node, factor)


def _plus(before: fx.Node, one: fx.Node | None, other: fx.Node) -> fx.Node:
    if one is None:
        return other
    with inserting_before(before) as insert:
        return insert(_aten.add.Tensor, one, other)


def _refusal(site: AttentionSite, node: fx.Node, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{site}: lowering=recompute needs scores of the form α·QKᵀ + β, but {reason} ({node.name}: {node.target}). "
        "Use lowering=materialize for this stack."
    )
