"""Value numbering: nodes that are certain to have the same value get the same number.

A number is a digest of the expression behind a node, down to inputs, parameters and constants, so it is also the same
in another capture of the same model. Every node is digested once; two nodes are compared in constant time.
"""

from __future__ import annotations

import ctypes
import hashlib
from typing import Any

import torch
from torch import fx

from ..memory import written_tensors
from ..program import Program, get_attribute
from .axes import sizes
from .flow import SHAPE_ONLY, value_operands
from .follow import SAME_VALUE, arguments, aten, is_transparent_module, packet

_COMMUTATIVE = frozenset({
    aten.add, aten.mul, aten.multiply, aten.eq, aten.ne, aten.maximum, aten.minimum, aten.bitwise_and, aten.bitwise_or,
    aten.bitwise_xor, aten.logical_and, aten.logical_or, aten.logical_xor, aten.__and__, aten.__or__,
})  # fmt: skip

#: Comparisons, as the same comparison of swapped operands.
_MIRRORED = {aten.gt: aten.lt, aten.ge: aten.le, aten.greater: aten.lt, aten.greater_equal: aten.le}

_SYNONYMS = {
    aten.__and__: aten.bitwise_and, aten.__or__: aten.bitwise_or, aten.multiply: aten.mul, aten.view: aten.reshape,
    aten._unsafe_view: aten.reshape, aten.unsqueeze: aten.reshape, aten.squeeze: aten.reshape,
    aten.flatten: aten.reshape, aten.unflatten: aten.reshape,
    aten.expand_as: aten.expand, aten.broadcast_to: aten.expand,
}  # fmt: skip

#: Operators whose result is given by their first argument and the sizes of the result.
_SHAPED = frozenset({aten.reshape, aten.expand})

#: Arguments that say where and how a value is stored, not what it is.
_STORAGE = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking", "copy", "requires_grad"})


class ValueNumbers:
    """The numbers of a program's nodes, computed when asked for."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._numbers: dict[fx.Node, str] = {}
        self._written = written_tensors(program.graph)

    def __call__(self, node: fx.Node) -> str:
        """The number of a node."""
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [o for o in current.all_input_nodes if o not in self._numbers]
            if missing and not self._is_leaf(current):
                pending.extend(missing)
                continue
            pending.pop()
            if current not in self._numbers:
                self._numbers[current] = self._number(current)
        return self._numbers[node]

    def _is_leaf(self, node: fx.Node) -> bool:
        return node in self._written or not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))

    def _number(self, node: fx.Node) -> str:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return digest("size", str(value.node.expr))
        if not isinstance(value, (torch.Tensor, tuple, list)):
            return digest("number", repr(value))
        if node in self._written or torch.Tag.nondeterministic_seeded in _random_tags(node):
            return digest("node", node.name)
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        if packet(node) in SAME_VALUE or is_transparent_module(node, self._program):
            return self._cast(node)
        if node.op != "call_function":
            return digest(node.op, str(node.target), *map(self._text, (node.args, node.kwargs)))
        return self._call(node)

    def _attribute(self, path: str) -> str:
        """Parameters by path; constants by content, which is what two equal tables of two layers have in common."""
        tensor = get_attribute(self._program.module, path)
        if isinstance(tensor, torch.nn.Parameter) or not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            return digest("attribute", path)
        stored = tensor.detach().cpu().contiguous()
        content = hashlib.blake2b(ctypes.string_at(stored.data_ptr(), stored.nbytes)).hexdigest()
        return digest("constant", str(tensor.dtype), str(tuple(tensor.shape)), content)

    def _cast(self, node: fx.Node) -> str:
        operand = value_operands(node)[0]
        before, after = operand.meta["val"], node.meta["val"]
        if not isinstance(after, torch.Tensor) or before.dtype == after.dtype:
            return self._numbers[operand]
        return digest("cast", str(after.dtype), self._numbers[operand])

    def _call(self, node: fx.Node) -> str:
        op = packet(node)
        name = _SYNONYMS.get(op, op)
        shape = str(sizes(node)) if isinstance(node.meta["val"], torch.Tensor) else ""
        if name in _SHAPED:
            number, changed = self._numbers[node.all_input_nodes[0]], sizes(node.all_input_nodes[0]) != sizes(node)
            return digest(str(name), shape, number) if changed else number
        if op in SHAPE_ONLY:
            fill = [self._text(a) for key, a in arguments(node).items() if key == "fill_value"]
            return digest(str(op), shape, str(node.meta["val"].dtype), *fill)
        operands = [self._text(argument) for argument in node.args]
        mirror = _MIRRORED.get(op)
        if mirror is not None and len(operands) == 2 and isinstance(node.args[1], fx.Node):
            name, operands = mirror, operands[::-1]
        if op in _COMMUTATIVE and len(operands) == 2:
            operands = sorted(operands)
        kept = sorted((key, self._text(value)) for key, value in node.kwargs.items() if key not in _STORAGE)
        return digest(str(name), shape, *operands, str(kept))

    def _text(self, argument: Any) -> str:
        if isinstance(argument, fx.Node):
            return self._numbers[argument]
        if isinstance(argument, (list, tuple)):
            return "(" + ",".join(map(self._text, argument)) + ")"
        if isinstance(argument, dict):
            return str(sorted((key, self._text(value)) for key, value in argument.items()))
        return repr(argument)


def digest(*texts: str) -> str:
    """A short digest of texts.

    >>> digest("add", "a", "b") == digest("add", "a", "b") != digest("add", "ab", "")
    True
    """
    state = hashlib.blake2b(digest_size=8)
    for text in texts:
        state.update(str(len(text)).encode() + b":" + text.encode())
    return state.hexdigest()


def _random_tags(node: fx.Node) -> Any:
    """The tags of an operator that may draw random numbers; dropout in evaluation mode does not."""
    return () if packet(node) in SAME_VALUE else getattr(node.target, "tags", ())
