"""The attention maps that a program computes, each once however many layers use it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import sympy
import torch
from torch import fx

from ..program import module_path
from .einsum import indices
from .macs import FUSED_ATTENTION, STORED_MAP, attention_map_shape
from .sizes import elements, operands, operator_name, product, shape, tensor
from .walk import Step

#: Operators whose result may be an attention map.
SOFTMAX = frozenset({"aten.softmax", "aten._softmax", "aten._safe_softmax"})
_MAPS = SOFTMAX | {STORED_MAP}
_MATRIX_PRODUCTS = frozenset({"aten.matmul", "aten.bmm", "aten.baddbmm", "aten.linalg_matmul"})
_CONTRACTIONS = _MATRIX_PRODUCTS | FUSED_ATTENTION | {"aten.einsum", "aten.linear", "aten.addmm", "aten.mm"}

# The identities of a query and of a key.
Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """An attention map: the module call and node that compute it, its shape, the bytes of one element.

    ``shape`` is (batch, heads, queries, keys), or with batch and heads in one dimension where the model has them so.
    """

    path: str
    node: str
    shape: tuple[sympy.Expr, ...]
    itemsize: int
    fused: bool

    @property
    def bytes(self) -> sympy.Expr:
        """What the map takes in memory, where it is written out."""
        return product(self.shape) * self.itemsize


def attention_maps(steps: Iterable[Step]) -> list[AttentionMap]:
    """The distinct attention maps among the steps of a program, in the order of execution.

    A softmax is one where its result, before or after dropout, masks, casts and views, is contracted over its own
    dimension with values; with a single query only if its scores are a product, since otherwise it pools. A fused
    attention has one inside; it is the map of an earlier attention if both have the same query, key and mask (up to
    scale and zero padding), or if that one is stored, of the same query and key. The element size is
    the one with which the map meets the values.
    """
    found: list[AttentionMap] = []
    known: set[Any] = set()
    for step in steps:
        name, path = operator_name(step.node), module_path(step.node) or step.path
        if name in FUSED_ATTENTION:
            query, key, value = operands(step.node)[:3]
            attention_map = AttentionMap(path, step.node.name, attention_map_shape(step.node), _itemsize(value), True)
            scores = _scores(_pair(step, query, key), attention_map)
            identity = (scores, _masks(step))
            same, mine = {scores, identity}, {identity}
        elif name in _MAPS and (contracted := _contracted(step)) is not None:
            attention_map = AttentionMap(path, step.node.name, shape(step.node), _itemsize(contracted), False)
            identity = step.values[step.node]
            pairs = [_pair(step, *operands(step.node)[:2])] if name == STORED_MAP else _score_products(step)
            same, mine = {identity}, {identity, *(_scores(pair, attention_map) for pair in pairs)}
        else:
            continue
        if known.isdisjoint(same):
            found.append(attention_map)
        known |= mine
    return found


def _itemsize(node: fx.Node) -> int:
    return tensor(node).element_size()


def _scores(pair: Pair, attention_map: AttentionMap) -> Any:
    """The identity of scores: what query and key are made from, and the sizes of their product."""
    return pair, product(attention_map.shape), attention_map.shape[-1]


def _pair(step: Step, query: Any, key: Any) -> Pair:
    """What a query and a key are made from."""
    return step.values[query].source, step.values[key].source


def _masks(step: Step) -> str:
    """What a fused attention adds to its scores or hides of them."""
    rest = operands(step.node)[3:]
    if isinstance(step.node.target, torch._ops.OpOverload):
        names = [argument.name for argument in step.node.target._schema.arguments[3:]]
        masking = ("attn_mask", "attn_bias", "is_causal")
        masks = [value for name, value in zip(names, rest, strict=True) if name in masking]
    else:
        masks = rest[:2]
    return repr(fx.node.map_arg(masks, lambda node: step.values[node]))


def _score_products(step: Step) -> Iterator[Pair]:
    """The operands of every product that the scores of a softmax are made of."""
    pending, seen = [step.node], {step.node}
    while pending:
        for node in pending.pop().all_input_nodes:
            name = operator_name(node)
            if name in _MATRIX_PRODUCTS:
                yield _pair(step, *operands(node)[name == "aten.baddbmm" :][:2])
            elif name == "aten.einsum" and len(operands(node)[1]) == 2:
                yield _pair(step, *operands(node)[1])
            if name not in _CONTRACTIONS and node not in seen:
                seen.add(node)
                pending.append(node)


def _contracted(step: Step) -> fx.Node | None:
    """The form of a softmax's result that is contracted with values; None where it is no attention map."""
    softmax = step.node
    dim = -1 if operator_name(softmax) == STORED_MAP else operands(softmax)[1]
    keys, size = shape(softmax)[dim], elements(softmax)
    pending, seen = [softmax], {softmax}
    while pending:
        node = pending.pop()
        for user in node.users:
            if operator_name(user) in _CONTRACTIONS:
                queries = _queries(user, node, keys)
                if queries is not None and (queries != 1 or _has_scores(step)):
                    return node
            elif isinstance(user.meta.get("val"), torch.Tensor) and user not in seen and elements(user) == size:
                seen.add(user)
                pending.append(user)
    return None


def _has_scores(step: Step) -> bool:
    """Whether a map is made of a product of queries and keys."""
    return operator_name(step.node) == STORED_MAP or any(_score_products(step))


def _queries(user: fx.Node, node: fx.Node, keys: sympy.Expr) -> sympy.Expr | None:
    """The number of queries of a map that a contraction reads; None where it does not sum over the keys."""
    name, sizes = operator_name(user), shape(node)
    if name == "aten.einsum":
        equation, tensors, _ = operands(user)
        named, output = indices(equation, [len(shape(operand)) for operand in tensors])
        mine = dict(zip(named.pop(tensors.index(node)), sizes, strict=True))
        others = {index for operand in named for index in operand}
        summed = any(mine[index] == keys for index in mine.keys() & others - output)
        return product(mine[index] for index in mine.keys() & output - others) if summed else None
    if name not in _MATRIX_PRODUCTS or len(sizes) < 2:
        return None
    left, right = operands(user)[name == "aten.baddbmm" :][:2]
    if left is node and sizes[-1] == keys and len(shape(right)) > 1:
        return sizes[-2]
    return sizes[-1] if right is node and sizes[-2] == keys and len(shape(left)) > 1 else None
