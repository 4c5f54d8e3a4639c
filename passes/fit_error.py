"""The error that fitted weights cause in a model's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fxreuse.program import Program
from fxreuse.record import FitError


def fit_error(
    program: Program,
    stack: str,
    weights: Mapping[str, torch.Tensor],
    biases: Mapping[str, torch.Tensor],
    leaves: Sequence[torch.Tensor],
) -> FitError:
    """Run a program with other weights and biases, and compare its outputs with what it gives with its own.

    Arguments:
        program: the program before the fit.
        stack: the stack that the weights are of.
        weights: by path, what takes the place of a weight.
        biases: by path, what takes the place of a bias.
        leaves: the example inputs, as the program's placeholders take them.
    """
    model = program.copy().module.eval()
    with torch.no_grad():
        before = _tensors(model(*leaves))

        def error(replaced: Mapping[str, torch.Tensor]) -> float:
            if not replaced:
                return 0.0
            return _relative(_tensors(functional_call(model, dict(replaced), tuple(leaves), tie_weights=False)), before)

        return FitError(stack, error({**weights, **biases}), error(weights), error(biases))


def _tensors(outputs: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _relative(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    pairs = [(one.double(), other.double()) for one, other in zip(found, expected, strict=True)]
    off = sum(float((one - other).square().sum()) for one, other in pairs)
    size = sum(float(other.square().sum()) for _, other in pairs)
    return float((off / size if size else off) ** 0.5)
