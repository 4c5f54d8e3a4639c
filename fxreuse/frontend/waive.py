"""Waive guards that forbid one value, where model and graph agree at that value.

A guard ``size != 1`` (or ``!= 22``, from a table kept for the length of the last call) says that the model branches on
that value. Often the branch only saves work and gives the same result: running both decides it, since the value is the
only one that the guard excludes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..program import Program, fixed_size
from . import guards as guarding
from .inputs import Inputs


def waive_single_values(program: Program, model: torch.nn.Module, inputs: Inputs) -> Program:
    """Waive the guards that exclude the example itself, and those that exclude a batch of 1, where both runs agree."""
    leaves = program.call.leaves
    tensors = _tensors(inputs)
    if not leaves or any(t.ndim == 0 or t.is_meta for t in tensors) or any(p.is_meta for p in model.parameters()):
        return program
    excluding = [guard for guard in program.guards if not guarding.holds(guard, _sizes(program, inputs))]
    single = all(guarding.excludes_one_value(guard) for guard in excluding)
    if excluding and single and _agree(program, model, inputs):
        program.guards = tuple(guard for guard in program.guards if guard not in excluding)
    free = all(fixed_size(n.meta["val"].shape[0]) is None for n in program.graph.find_nodes(op="placeholder"))
    if not free or len({t.shape[0] for t in tensors}) != 1:
        return program
    row = Inputs(*pytree.tree_map_only(torch.Tensor, lambda t: t[:1], (inputs.args, inputs.kwargs)))
    sizes = _sizes(program, row)
    if not all(guarding.holds(guard, sizes) for guard in program.guards) and _agree(program, model, row):
        program.guards = guarding.allow_batch_of_one(program.guards, leaves[0])
    return program


def _tensors(inputs: Inputs) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tuple(inputs)) if isinstance(leaf, torch.Tensor)]


def _sizes(program: Program, inputs: Inputs) -> dict[tuple[str, int], int]:
    pairs = zip(program.call.leaves, _tensors(inputs), strict=True)
    return {(leaf.name, dim): size for leaf, tensor in pairs for dim, size in enumerate(tensor.shape)}


def _agree(program: Program, model: torch.nn.Module, inputs: Inputs) -> bool:
    """Whether model and graph give the same on these inputs; not where either fails."""
    try:
        with torch.no_grad():
            found = pytree.tree_leaves(program.module(*_tensors(inputs)))
            expected = pytree.tree_leaves(model(*inputs.args, **inputs.kwargs))
    except Exception:
        return False
    return len(expected) == len(found) and all(map(_same, expected, found))


def _same(expected: Any, found: Any) -> bool:
    if not isinstance(expected, torch.Tensor):
        return bool(expected == found)
    if expected.shape != found.shape:
        return False
    return torch.allclose(expected, found, rtol=1e-4, atol=1e-5, equal_nan=True)
