"""Integers that follow from sizes alone keep their values while a model is run with fake tensors.

Models branch on them: whether positions are consecutive decides in transformers whether a causal mask is written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _pytree as pytree

# The elements of a tensor up to which its values are computed: positions, and no large masks.
_MOST = 2**20

Call = tuple[tuple[Any, ...], Mapping[str, Any]]


class Integers:
    """Runs operators of a fake run, with values where operands have them and the result is a few integers."""

    def __init__(self) -> None:
        self._overwritten: set[int] = set()

    def result(self, func: Any, given: Call, fakes: Call) -> Any:
        """The result of an operator: a fake tensor as a rule, a real one where it has values.

        Arguments:
            func: the operator.
            given: its arguments and keyword arguments.
            fakes: the same with fake tensors alone.
        """
        operands = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]
        if not all(map(self._has_values, operands)) or torch.Tag.nondeterministic_seeded in func.tags:
            if func._schema.is_mutable:
                self._overwritten.update(o.untyped_storage()._cdata for o in operands if not isinstance(o, FakeTensor))
            return func(*fakes[0], **fakes[1])
        if operands and not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(func.tags):
            return _run(func, given)
        result = func(*fakes[0], **fakes[1])
        made = pytree.tree_leaves(result)
        return _run(func, given) if made and all(map(_is_few_integers, made)) else result

    def _has_values(self, tensor: torch.Tensor) -> bool:
        real = not isinstance(tensor, FakeTensor) and _is_few_integers(tensor)
        return real and tensor.untyped_storage()._cdata not in self._overwritten


def _run(func: Any, given: Call) -> Any:
    with unset_fake_temporarily():
        return func(*given[0], **given[1])


def _is_few_integers(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        return False
    return not value.is_floating_point() and not value.is_complex() and value.numel() <= _MOST
