"""Attention over some of its keys: the others are left out before keys and values are projected."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from fxreuse.finding.axes import product as size_of
from fxreuse.finding.axes import sizes, start
from fxreuse.finding.contractions import contraction, is_convolution
from fxreuse.finding.flow import Flow
from fxreuse.finding.follow import (
    SAME_VALUE,
    SPLITTING,
    VIEWS,
    arguments,
    is_elementwise,
    is_transparent_module,
    packet,
    transfer,
)
from fxreuse.nodes import call
from fxreuse.program import Program

_aten = torch.ops.aten
_NORMS = (_aten.layer_norm, _aten.rms_norm)
_REDUCTIONS = frozenset({_aten.mean, _aten.sum, _aten.amax, _aten.amin, _aten.var, _aten.linalg_vector_norm})
# Views that say their sizes in a list.
_SIZED = frozenset(
    {_aten.reshape, _aten.view, _aten._unsafe_view, _aten._reshape_copy, _aten.expand, _aten.broadcast_to}
)
# Views that take their sizes from another tensor.
_LIKE = frozenset({_aten.view_as, _aten.reshape_as, _aten.expand_as})
_MOVES = VIEWS | SPLITTING | {_aten.unbind, _aten.cat, _aten.stack, _aten.repeat_interleave, operator.getitem}


class Gatherer:
    """Values with some elements of one axis, computed from such values as far back as that saves work.

    ``gather(node, axis)`` is ``node.index_select(axis, index)``. Sound because each operator that it goes back through
    treats the elements of the axis one by one; behind any other, the value itself is gathered. It goes back through a
    projection, so that only what is left is projected, and stops in front of it where others read the same value.

    ``work`` are the multiply-accumulates of the projections, and other products, that go over these elements alone.

    Arguments:
        program: the program, which is changed: nodes are added.
        index: the node that has the indices.
    """

    def __init__(self, program: Program, flow: Flow, index: fx.Node) -> None:
        self._program, self._flow, self._index = program, flow, index
        self._count = sizes(index)[0]
        self._made: dict[tuple[fx.Node, int], fx.Node] = {}
        self.work: sympy.Expr = sympy.Integer(0)

    def known(self, node: fx.Node, axis: int, gathered: fx.Node) -> None:
        """Say what a value is with the other elements left out."""
        self._made[node, axis % len(sizes(node))] = gathered

    def gather(self, node: fx.Node, axis: int, behind: bool = False) -> fx.Node:
        """A node with some elements of a node's axis; ``behind`` says that it is what a projection reads."""
        axis %= len(sizes(node))
        if (node, axis) not in self._made:
            made = None if behind and len(node.users) > 1 else self._back(node, axis, behind)
            self._made[node, axis] = made or self._after(node, _aten.index_select.default, node, axis, self._index)
        return self._made[node, axis]

    def contract(self, node: fx.Node) -> fx.Node:
        """A product over some elements of the one axis that it sums over."""
        product = contraction(node)
        assert product is not None
        (label,) = product.summed
        replaced = {}
        for operand in (product.left, product.right):
            replaced[operand] = self.gather(operand, product.side(operand)[0].index(label))
        return self._again(node, replaced)

    def _after(self, node: fx.Node, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node behind another one and the indices, in the same module."""
        last = node if self._index < node else self._index
        with node.graph.inserting_before(last.next):
            return call(node.graph, target, args, kwargs, like=node)

    def _again(self, node: fx.Node, replaced: dict[fx.Node, fx.Node], args: Any = None) -> fx.Node:
        """The same call on other operands."""
        args, kwargs = fx.node.map_arg(
            (node.args if args is None else args, node.kwargs), lambda operand: replaced.get(operand, operand)
        )
        last = node
        for operand in replaced.values():
            last = operand if last < operand else last
        assert callable(node.target) or isinstance(node.target, str)
        with node.graph.inserting_before(last.next):
            return call(node.graph, node.target, args, kwargs, like=node)

    def _back(self, node: fx.Node, axis: int, behind: bool) -> fx.Node | None:
        """The node computed from gathered operands, or None where that would not be the same."""
        if node.op == "call_module":
            (operand, *others) = node.all_input_nodes
            if others or not is_transparent_module(node, self._program):
                return None
            return self._again(node, {operand: self.gather(operand, axis, behind)})
        if node.op != "call_function":
            return None
        op = packet(node)
        if contraction(node) is not None:
            return self._product(node, axis, behind)
        if op in SAME_VALUE:
            operand, *typed = node.all_input_nodes
            replaced = {operand: self.gather(operand, axis, behind)}
            return self._again(node, {**replaced, **self._some_elements(typed)})
        if is_elementwise(node):
            return self._elementwise(node, axis, behind)
        if op in _NORMS:
            return self._norm(node, axis, behind)
        if op in _REDUCTIONS:
            return self._reduced(node, axis, behind)
        if op is _aten.embedding:
            return self._embedded(node, axis, behind)
        return self._moved(node, axis, behind) if op in _MOVES else None

    def _product(self, node: fx.Node, axis: int, behind: bool) -> fx.Node | None:
        product = contraction(node)
        assert product is not None
        label = product.axes[axis]
        if not {product.left, product.right} <= set(node.all_input_nodes) or product.left is product.right:
            return None
        replaced = {}
        for operand in (product.left, product.right):
            labels, other, _ = product.side(operand)
            if label in labels and sizes(operand)[labels.index(label)] != 1:
                projected = other in self._flow.parameters and other not in self._flow.inputs
                replaced[operand] = self.gather(operand, labels.index(label), behind or projected)
        if product.addend is not None and not is_convolution(node):  # whose bias is over channels alone
            replaced |= self._aligned(node, product.addend, axis, behind)
        made = self._again(node, replaced)
        labels, _, _ = product.side(product.left)
        summed = [size for label, size in zip(labels, sizes(product.left), strict=True) if label in product.summed]
        self.work += size_of([*sizes(made), *summed])
        return made

    def _aligned(self, node: fx.Node, operand: fx.Node, axis: int, behind: bool) -> dict[fx.Node, fx.Node]:
        """An operand that is broadcast to a node, gathered where it has the axis."""
        own = axis - (len(sizes(node)) - len(sizes(operand)))
        if own < 0 or sizes(operand)[own] == 1:
            return {}
        return {operand: self.gather(operand, own, behind)}

    def _elementwise(self, node: fx.Node, axis: int, behind: bool) -> fx.Node:
        replaced: dict[fx.Node, fx.Node] = {}
        for operand in node.all_input_nodes:
            if isinstance(operand.meta["val"], torch.Tensor):
                replaced |= self._aligned(node, operand, axis, behind)
        return self._again(node, replaced)

    def _some_elements(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Nodes of which the type is all that matters, in any form without the other elements that there is."""
        return {node: made for (node, _), made in self._made.items() if node in nodes}

    def _norm(self, node: fx.Node, axis: int, behind: bool) -> fx.Node | None:
        named = arguments(node)
        operand = named["input"]
        if axis >= len(sizes(node)) - len(named["normalized_shape"]):
            return None
        return self._again(node, {operand: self.gather(operand, axis, behind)})

    def _reduced(self, node: fx.Node, axis: int, behind: bool) -> fx.Node | None:
        """A sum or the like over other axes."""
        named = arguments(node)
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        rank, dims = len(sizes(operand)), named.get("dim")
        if dims is None:
            return None
        summed = {dim % rank for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
        kept = list(range(rank)) if named.get("keepdim") else [dim for dim in range(rank) if dim not in summed]
        if not summed or kept[axis] in summed:
            return None
        return self._again(node, {operand: self.gather(operand, kept[axis], behind)})

    def _embedded(self, node: fx.Node, axis: int, behind: bool) -> fx.Node | None:
        indices = arguments(node)["indices"]
        if axis >= len(sizes(indices)):
            return None
        return self._again(node, {indices: self.gather(indices, axis, behind)})

    def _moved(self, node: fx.Node, axis: int, behind: bool) -> fx.Node | None:
        """A view: the axis has to be one whole axis of its operand."""
        if packet(node) in (_aten.cat, _aten.stack):
            return self._joined(node, axis, behind)
        operand = node.args[0]
        if not isinstance(operand, fx.Node):
            return None
        if packet(node) is operator.getitem:
            return self._taken(node, operand, axis, behind)
        dim = self._source(node, operand, axis)
        if dim is None:
            return None
        replaced = {operand: self.gather(operand, dim, behind)}
        if packet(node) in _LIKE:
            other = node.args[1]
            assert isinstance(other, fx.Node)
            replaced[other] = self.gather(other, axis, behind)
        return self._again(node, replaced, self._resized(node, axis))

    def _source(self, node: fx.Node, operand: fx.Node, axis: int) -> int | None:
        """The axis of a view's operand that an axis of it is."""
        layout = transfer(node, operand, start(operand), self._program)
        if layout is None:
            return None
        parts = [part for part in layout[axis] if part.size != 1]
        if len(parts) != 1 or parts[0].piece or not isinstance(parts[0].source, int):
            return None
        dim = parts[0].source
        return dim if sizes(operand)[dim] == sizes(node)[axis] else None

    def _resized(self, node: fx.Node, axis: int) -> tuple[Any, ...]:
        """The arguments of a view with the new size in their list of sizes."""
        if packet(node) not in _SIZED:
            return node.args
        wanted = list(node.args[1])  # type: ignore[arg-type]
        wanted[axis] = self._count
        return (node.args[0], wanted, *node.args[2:])

    def _joined(self, node: fx.Node, axis: int, behind: bool) -> fx.Node | None:
        """Values side by side along another axis."""
        named = arguments(node)
        dim = named["dim"] % len(sizes(node))
        if dim == axis:
            return None
        own = axis - (1 if packet(node) is _aten.stack and axis > dim else 0)
        return self._again(node, {operand: self.gather(operand, own, behind) for operand in named["tensors"]})

    def _taken(self, node: fx.Node, several: fx.Node, axis: int, behind: bool) -> fx.Node | None:
        """One of the several results of a split along another axis."""
        operand = several.args[0]
        if packet(several) not in SPLITTING | {_aten.unbind} or not isinstance(operand, fx.Node):
            return None
        dim = arguments(several)["dim"] % len(sizes(operand))
        unbound = packet(several) is _aten.unbind
        own = axis + (1 if unbound and axis >= dim else 0)
        if own == dim:
            return None
        gathered = self.gather(operand, own, behind)
        if (several, own) not in self._made:
            self._made[several, own] = self._again(several, {operand: gathered})
        return self._again(node, {several: self._made[several, own]})
