"""From a model to a normalised program: capture, normalise, and the last checks that need both."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from . import guards as guarding
from .capture import caches_off, capture, eval_mode
from .inputs import Inputs
from .inputs import normalise as normalise_inputs
from .passes.normalise import normalise
from .program import Program
from .untouched import untouched


def load_program(model: torch.nn.Module | ExportedProgram, example_inputs: Any = None) -> Program:
    """Capture a model and normalise it. See `fxreuse.capture.capture`."""
    program = normalise(capture(model, example_inputs))
    if isinstance(model, ExportedProgram):
        return program
    with untouched(model), eval_mode(model), caches_off(model):
        return waive_batch_of_one(program, model, normalise_inputs(model, example_inputs))


def waive_batch_of_one(program: Program, model: torch.nn.Module, inputs: Inputs) -> Program:
    """Where guards forbid a batch of 1, run model and graph on one row: if they agree, the guards are waived for it."""
    leaves = program.call.leaves
    if not leaves or any(leaf.ndim == 0 for leaf in leaves):
        return program
    tensors = [leaf for leaf in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(leaf, torch.Tensor)]
    sizes = {
        (leaf.name, dim): size for leaf, t in zip(leaves, tensors, strict=True) for dim, size in enumerate(t.shape)
    }
    sizes |= {(leaf.name, 0): 1 for leaf in leaves}
    if all(guarding.holds(guard, sizes) for guard in program.guards) or len({t.shape[0] for t in tensors}) != 1:
        return program
    free = all(not isinstance(n.meta["val"].shape[0], int) for n in program.graph.find_nodes(op="placeholder"))
    if not free or any(t.is_meta for t in (*tensors, *model.parameters())):
        return program
    args, kwargs = pytree.tree_map(lambda t: t[:1] if isinstance(t, torch.Tensor) else t, (inputs.args, inputs.kwargs))
    try:
        with torch.no_grad():
            expected = pytree.tree_leaves(model(*args, **kwargs))
            found = pytree.tree_leaves(program.module(*(t[:1] for t in tensors)))
    except Exception:
        return program
    agree = len(expected) == len(found) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        if isinstance(a, torch.Tensor)
        else a == b
        for a, b in zip(expected, found, strict=True)
    )
    if agree:
        program.guards = guarding.allow_batch_of_one(program.guards, leaves[0])
    return program
