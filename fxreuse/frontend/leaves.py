"""Example inputs as the placeholders of a program take them."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..program import CallingConvention, Leaf
from .inputs import bind, normalise


def leaf_name(argument: str, path: pytree.KeyPath) -> str:
    """The name of a tensor among the inputs: its argument, and where it stands in that."""
    return argument + pytree.keystr(path)


def example_leaves(
    model: torch.nn.Module | ExportedProgram, convention: CallingConvention, example_inputs: Any = None
) -> tuple[torch.Tensor, ...] | None:
    """The tensors of example inputs in the order of a program's placeholders; None of an exported program.

    Arguments:
        model: the model that was captured.
        convention: how it is called.
        example_inputs: as `fxreuse.apply` takes them; inferred where left out.
    """
    if isinstance(model, ExportedProgram):
        return None
    bound = bind(model, normalise(model, example_inputs))
    found: list[torch.Tensor] = []
    for argument in convention.arguments:
        flat = pytree.tree_leaves(bound[argument.name])
        found += [value for value, leaf in zip(flat, argument.leaves, strict=True) if isinstance(leaf, Leaf)]
    return tuple(found)
