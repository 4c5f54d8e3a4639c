"""Products that sum over axes, whatever operator they are written with, as one thing: an equation over two operands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .axes import Layout, Part, Size, sizes
from .follow import arguments, aten, packet


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

    def push(self, operand: fx.Node, layout: Layout) -> Layout:
        """The layout of the result in terms of one operand's axes; those of the other one have no source."""
        labels = self.side(operand)[0]
        known = dict(zip(labels, layout, strict=True))
        own = dict(zip(labels, sizes(operand), strict=True))
        return tuple(
            known[label] if label in known and own[label] == s else (Part(None, s),)
            for label, s in zip(self.axes, sizes(self.node), strict=True)
        )


def contraction(node: fx.Node) -> Contraction | None:
    """The node as a contraction of two tensors, or None if it is not one."""
    reader = _READERS.get(packet(node)) if node.op == "call_function" else None
    return None if reader is None else reader(node)


_BATCH = "abcdefgh"


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
    named = arguments(node)
    if len(named["tensors"]) != 2:
        return None
    left, right = named["tensors"]
    labels = einsum_labels(named["equation"], [len(sizes(left)), len(sizes(right))])
    return None if labels is None else Contraction(node, left, right, *labels)


def einsum_labels(equation: str, ranks: list[int]) -> tuple[str, str, str] | None:
    """The labels of two operands and of the result, ellipses and the implicit result written out.

    >>> einsum_labels("...id,...jd->...ij", [4, 4])
    ('ABid', 'ABjd', 'ABij')
    >>> einsum_labels("bik,kj", [3, 2])
    ('bik', 'kj', 'bij')
    """
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or any(len(set(t.replace("...", ""))) != len(t.replace("...", "")) for t in terms):
        return None
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    widths = [rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=True)]
    ellipsis = "".join(spare[: max(widths)])
    if not arrow:
        letters = (inputs.replace("...", "")).replace(",", "")
        result = ("..." if "..." in inputs else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    left, right = (t.replace("...", ellipsis[len(ellipsis) - width :]) for t, width in zip(terms, widths, strict=True))
    return left, right, result.replace("...", ellipsis)


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
}


def is_convolution(node: fx.Node) -> bool:
    """Whether a node is a convolution: a projection over its second dimension."""
    return node.op == "call_function" and packet(node) in _CONVOLUTIONS


_CONVOLUTIONS = frozenset({aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution, torch.ops.aten._convolution})
