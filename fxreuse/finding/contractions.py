"""Products that sum over axes, whatever operator they are written with, as one thing: an equation over two operands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import fx

from .axes import Layout, Part, Size, sizes
from .follow import REGROUPING, VIEWS, arguments, aten, packet


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A product of two tensors summed over the axes that it does not keep.

    ``left_axes``, ``right_axes`` and ``axes`` label the dimensions of the operands and of the result; operands of
    fewer dimensions than a batched product has are aligned at their last one. ``addend`` is what is added to it.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_axes: str
    right_axes: str
    axes: str
    addend: fx.Node | None = None

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        """What is multiplied and added."""
        return (self.left, self.right) if self.addend is None else (self.left, self.right, self.addend)

    @property
    def summed(self) -> frozenset[str]:
        """The labels of the axes that are summed over."""
        return frozenset(self.left_axes) & frozenset(self.right_axes) - frozenset(self.axes)

    def side(self, operand: fx.Node) -> tuple[str, fx.Node, str]:
        """The labels of one operand, and the other operand with its labels."""
        if operand is self.left:
            return self.left_axes, self.right, self.right_axes
        return self.right_axes, self.left, self.left_axes

    def sizes(self) -> dict[str, Size]:
        """The size of every axis; of a broadcast one, the size that it has in the result."""
        found: dict[str, Size] = {}
        for labels, node in ((self.left_axes, self.left), (self.right_axes, self.right), (self.axes, self.node)):
            for label, value in zip(labels, sizes(node), strict=True):
                if found.get(label, 1) == 1 or label in self.axes:
                    found[label] = value
        return found

    def sources(self, operand: fx.Node, layout: Layout) -> set[Hashable]:
        """The sources of the axes of an operand that are summed over."""
        labels = self.side(operand)[0]
        return {part.source for label, dim in zip(labels, layout, strict=True) if label in self.summed for part in dim}

    def push(self, operand: fx.Node, layout: Layout, other: Hashable = None) -> Layout:
        """The layout of the result in terms of one operand's axes; those of the other one have the source ``other``."""
        labels = self.side(operand)[0]
        known = dict(zip(labels, layout, strict=True))
        own = dict(zip(labels, sizes(operand), strict=True))
        return tuple(
            known[label] if label in known and own[label] == s else (Part(None if label in known else other, s),)
            for label, s in zip(self.axes, sizes(self.node), strict=True)
        )


def contraction(node: fx.Node) -> Contraction | None:
    """The node as a contraction of two tensors, or None if it is not one."""
    reader = _READERS.get(packet(node)) if node.op == "call_function" else None
    return None if reader is None else reader(node)


_BATCH = "abcdefgh"
_OTHERS = "stuvwxyz"
_PRODUCTS = frozenset({aten.mul, aten.multiply})
_FACTORS = _PRODUCTS | {aten.div, aten.divide, aten.true_divide}


def _matmul(node: fx.Node, left: fx.Node, right: fx.Node, addend: fx.Node | None = None) -> Contraction | None:
    ranks = len(sizes(left)), len(sizes(right))
    if min(ranks) == 0 or max(ranks) > len(_BATCH):
        return None
    left_axes = "k" if ranks[0] == 1 else _BATCH[len(_BATCH) - ranks[0] + 2 :] + "mk"
    right_axes = "k" if ranks[1] == 1 else _BATCH[len(_BATCH) - ranks[1] + 2 :] + "kn"
    batch = _BATCH[len(_BATCH) - max(ranks) + 2 :] if max(ranks) > 2 else ""
    axes = batch + ("m" if ranks[0] > 1 else "") + ("n" if ranks[1] > 1 else "")
    return Contraction(node, left, right, left_axes, right_axes, axes, addend)


def _plain(node: fx.Node) -> Contraction | None:
    left, right = (value for value in arguments(node).values() if isinstance(value, fx.Node))
    return _matmul(node, left, right)


def _with_addend(node: fx.Node) -> Contraction | None:
    named = arguments(node)
    addend, left, right = (value for value in named.values() if isinstance(value, fx.Node))
    return _matmul(node, left, right, None if named["beta"] == 0 else addend)


def _linear(node: fx.Node) -> Contraction | None:
    named = arguments(node)
    left, right = named["input"], named["weight"]
    if len(sizes(right)) != 2:
        return None
    outer = _BATCH[len(_BATCH) - len(sizes(left)) + 1 :]
    return Contraction(node, left, right, outer + "k", "nk", outer + "n", named["bias"])


def _einsum(node: fx.Node) -> Contraction | None:
    """An einsum of two tensors; further ones have to be parameters, which weigh or project what the two give."""
    named = arguments(node)
    tensors = named["tensors"]
    labels = einsum_labels(named["equation"], [len(sizes(t)) for t in tensors])
    multiplied = [place for place, t in enumerate(tensors) if len(tensors) == 2 or not is_attribute(t)]
    if labels is None or len(multiplied) != 2:
        return None
    left, right = multiplied
    return Contraction(node, tensors[left], tensors[right], labels[left], labels[right], labels[-1])


def is_attribute(node: fx.Node) -> bool:
    """Whether a value is a view of a parameter, a buffer or a constant."""
    while packet(node) in VIEWS | REGROUPING:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def einsum_labels(equation: str, ranks: list[int]) -> tuple[str, ...] | None:
    """The labels of the operands, and last those of the result, ellipses and the implicit result written out.

    >>> einsum_labels("...id,...jd->...ij", [4, 4])
    ('ABid', 'ABjd', 'ABij')
    >>> einsum_labels("bik,kj", [3, 2])
    ('bik', 'kj', 'bij')
    """
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if any(len(set(t.replace("...", ""))) != len(t.replace("...", "")) for t in terms):
        return None
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    widths = [rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=True)]
    ellipsis = "".join(spare[: max(widths)])
    if not arrow:
        letters = (inputs.replace("...", "")).replace(",", "")
        result = ("..." if "..." in inputs else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    written = [t.replace("...", ellipsis[len(ellipsis) - width :]) for t, width in zip(terms, widths, strict=True)]
    return (*written, result.replace("...", ellipsis))


def _tensordot(node: fx.Node) -> Contraction | None:
    named = arguments(node)
    left, right = named["self"], named["other"]
    ranks = len(sizes(left)), len(sizes(right))
    if sum(ranks) > len(_BATCH + _OTHERS):
        return None
    left_axes, right_axes = list((_BATCH + _OTHERS)[: ranks[0]]), list((_BATCH + _OTHERS)[ranks[0] : sum(ranks)])
    for one, other in zip(named["dims_self"], named["dims_other"], strict=True):
        right_axes[other] = left_axes[one]
    axes = [a for a in left_axes if a not in right_axes] + [a for a in right_axes if a not in left_axes]
    return Contraction(node, left, right, "".join(left_axes), "".join(right_axes), "".join(axes))


def _inner(node: fx.Node) -> Contraction | None:
    named = arguments(node)
    left, right = named["self"], named["other"]
    ranks = len(sizes(left)), len(sizes(right))
    if min(ranks) == 0 or max(ranks) > len(_BATCH):
        return None
    kept = _BATCH[: ranks[0] - 1], _OTHERS[: ranks[1] - 1]
    return Contraction(node, left, right, kept[0] + "k", kept[1] + "k", "".join(kept))


def _pointwise_convolution(node: fx.Node) -> Contraction | None:
    """A convolution of width 1: a projection of its second dimension."""
    named = arguments(node)
    weight, spatial = named["weight"], len(sizes(named["input"])) - 2
    if (
        len(sizes(weight)) != spatial + 2
        or named["groups"] != 1
        or any(s != 1 for s in (*sizes(weight)[2:], *named["stride"]))
        or any(s != 0 for s in named["padding"])
    ):
        return None
    outer = _BATCH[1 : spatial + 1]
    labels = f"ak{outer}", f"nk{_OTHERS[:spatial]}", f"an{outer}"
    return Contraction(node, named["input"], weight, *labels, named["bias"])


def _sum_of_product(node: fx.Node) -> Contraction | None:
    """A multiplication that is summed, where each operand has an axis of its own: ``(q[:, :, None] * k).sum(-1)``.

    Without that it is a reduction of one tensor, weighted by another.
    """
    named = arguments(node)
    product = named["self"]
    while packet(product) in _FACTORS and any(not isinstance(a, fx.Node) for a in product.args[:2]):
        product = product.args[0]
    if not isinstance(product, fx.Node) or packet(product) not in _PRODUCTS or named.get("keepdim", True):
        return None
    left, right = product.args[:2]
    shape = sizes(product)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or not named["dim"] or len(shape) > len(_BATCH):
        return None
    left_axes, right_axes = (_broadcast_labels(operand, shape) for operand in (left, right))
    summed = {_BATCH[dim % len(shape)] for dim in named["dim"]}
    kept = set(_BATCH) - summed
    own = set(left_axes) & kept - set(right_axes), set(right_axes) & kept - set(left_axes)
    if not summed <= set(left_axes) & set(right_axes) or not all(own):
        return None
    axes = "".join(label for label in _BATCH[: len(shape)] if label not in summed)
    return Contraction(node, left, right, left_axes, right_axes, axes)


def _broadcast_labels(operand: fx.Node, shape: tuple[Size, ...]) -> str:
    """A label for every dimension of an operand, of its own where it has one element for all of the result's."""
    own = sizes(operand)
    after = range(len(shape) - len(own), len(shape))
    return "".join(_OTHERS[i] if s == 1 and shape[i] != 1 else _BATCH[i] for i, s in zip(after, own, strict=True))


_READERS: dict[Any, Callable[[fx.Node], Contraction | None]] = {
    aten.matmul: _plain,
    aten.bmm: _plain,
    aten.mm: _plain,
    aten.mv: _plain,
    aten.dot: _plain,
    aten.addmm: _with_addend,
    aten.baddbmm: _with_addend,
    aten.linear: _linear,
    aten.einsum: _einsum,
    aten.tensordot: _tensordot,
    aten.inner: _inner,
    aten.sum: _sum_of_product,
    aten.conv1d: _pointwise_convolution,
    aten.conv2d: _pointwise_convolution,
    aten.conv3d: _pointwise_convolution,
}


def is_convolution(node: fx.Node) -> bool:
    """Whether a node is a convolution: a projection over its second dimension."""
    return node.op == "call_function" and packet(node) in _CONVOLUTIONS


_CONVOLUTIONS = frozenset({aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution, torch.ops.aten._convolution})
