"""The backward pass, read off the forward one: what gradients cost.

Every contraction has one more of the same size for each operand that needs a gradient; a fused attention counts as its
unfused form does, without what its kernel computes again. Every other operator reads what it read and the gradient of
its result, and writes the gradients of its operands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import sympy

from .operations import Access, Operation

_ADDEND_FIRST = frozenset({"aten.addmm", "aten._addmm_activation", "aten.addmv", "aten.baddbmm", "aten.addbmm"})


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one operator costs in the backward pass."""

    operation: Operation
    macs: sympy.Expr
    bytes: sympy.Expr


def backward(operations: Iterable[Operation]) -> Iterator[Cost]:
    """What the backward pass costs, operator by operator, in the order of the forward pass.

    Parameters need gradients, inputs and buffers do not. What is computed without gradients is only told apart by its
    dtype and by ``detach``.
    """
    needing: set[int] = set()
    for operation in operations:
        needs = [access for access in operation.reads if _needs(access, needing)]
        if not needs or not operation.dtype.is_floating_point or operation.op == "aten.detach":
            continue
        needing.update(access.storage for access in operation.writes)
        if not operation.view:
            yield Cost(operation, _macs(operation, needs), _bytes(operation, needs))


def _needs(access: Access, needing: set[int]) -> bool:
    return access.role == "parameter" or access.storage in needing


def _factors(operation: Operation) -> tuple[Access, ...]:
    """The two operands that a contraction multiplies; one where they are the same."""
    return operation.reads[operation.op in _ADDEND_FIRST :][:2]


def _gradients(operation: Operation, needs: list[Access]) -> int:
    """How many of the factors of a contraction need gradients."""
    factors = _factors(operation)
    return sum(2 if len(factors) == 1 else 1 for access in factors if access in needs)


def _macs(operation: Operation, needs: list[Access]) -> sympy.Expr:
    """The forward's work once more for every factor that needs a gradient; an attention has two products."""
    if operation.kind == "attention":
        return 2 * operation.macs
    return _gradients(operation, needs) * operation.macs


def _bytes(operation: Operation, needs: list[Access]) -> sympy.Expr:
    """What was read is read again, and the gradient of the result once for every gradient of a factor."""
    times = max(1, _gradients(operation, needs)) if operation.macs != 0 else 1
    written = sympy.Add(*(access.bytes for access in needs))
    return operation.bytes_read + times * operation.bytes_written + written
