"""The sizes of example inputs: made fit for capture, and declared free."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from ..errors import InputError
from .inputs import Inputs, bind
from .leaves import leaf_name

#: A dimension of a tensor among the inputs, by the name that its leaf has in a program.
Place = tuple[str, int]


def widen_batch(inputs: Inputs) -> Inputs:
    """The same inputs with a batch of at least 2 that no other size equals: rows are repeated.

    Export takes sizes of 1, and sizes that happen to be equal, for facts about the model.
    """
    leaves = [leaf for leaf in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(leaf, torch.Tensor)]
    batches = {leaf.shape[0] for leaf in leaves if leaf.ndim}
    if len(batches) != 1 or any(leaf.ndim == 0 for leaf in leaves):
        return inputs
    (batch,) = batches
    if batch == 0:
        raise InputError("example_inputs: expected at least one row, found a batch of 0; pass inputs with rows in them")
    others = {size for leaf in leaves for size in leaf.shape[1:]}
    wide = max(2, batch)
    while wide in others:
        wide += 1
    if wide == batch:
        return inputs

    def repeat(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        rows = torch.arange(wide, device=leaf.device) % batch
        return leaf.detach().index_select(0, rows).requires_grad_(leaf.requires_grad)

    args, kwargs = pytree.tree_map(repeat, (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs)


def shorten(inputs: Inputs) -> Inputs:
    """The same inputs an eighth shorter: the second axis of matrices, and of whatever else is as long as they are."""
    leaves = [leaf for leaf in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(leaf, torch.Tensor)]
    lengths = {leaf.shape[1] for leaf in leaves if leaf.ndim == 2}

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        for dim in range(1, leaf.ndim):
            if leaf.shape[dim] in lengths:
                leaf = leaf.narrow(dim, 0, max(2, leaf.shape[dim] - max(1, leaf.shape[dim] // 8)))
        return leaf

    return Inputs(*pytree.tree_map(cut, (inputs.args, inputs.kwargs)))


def rows_are_free(model: torch.nn.Module, inputs: Inputs, only: frozenset[Place] | None = None) -> bool:
    """Whether the first size of every input may be another one, where only some may."""
    return only is None or all((name, 0) in only for name, _ in _named_tensors(model, inputs))


def _named_tensors(model: torch.nn.Module, inputs: Inputs) -> list[tuple[str, torch.Tensor]]:
    return [
        (leaf_name(argument, path), leaf)
        for argument, value in bind(model, inputs).items()
        for path, leaf in pytree.tree_flatten_with_path(value)[0]
        if isinstance(leaf, torch.Tensor)
    ]


def free_shapes(model: torch.nn.Module, inputs: Inputs, only: frozenset[Place] | None = None) -> Any:
    """Which sizes of which inputs are free: all but image axes and single rows, in the form that export takes.

    With ``only``, none but those are.
    """
    leaves = [leaf for leaf in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(leaf, torch.Tensor)]
    lengths = {size for leaf in leaves if leaf.ndim in (1, 2, 3) for size in leaf.shape[1:]}

    def free(argument: str, path: pytree.KeyPath, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        image = leaf.ndim > 3 and leaf.is_floating_point() and leaf.shape[-1] not in lengths
        name, dims = leaf_name(argument, path), range(min(leaf.ndim, 1) if image else leaf.ndim)
        chosen = [dim for dim in dims if only is None or (name, dim) in only]
        return {dim: Dim.AUTO for dim in chosen if leaf.ndim < 4 or leaf.shape[dim] != 1}

    return {
        argument: pytree.tree_map_with_path(functools.partial(free, argument), value)
        for argument, value in bind(model, inputs).items()
    }
