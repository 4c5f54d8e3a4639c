"""New parameters and buffers in the tree of a program, and the nodes that read them, or the leading part of them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from fxreuse.finding.axes import Size, sizes
from fxreuse.program import Program, get_attribute

from .arrange import Insert


def free_sizes() -> AbstractContextManager[Any]:
    """Infer shapes without settling a free size, as capture does: what is as long as the example may be shorter."""
    return torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]


def leading(insert: Insert, node: fx.Node, dim: int, length: fx.Node) -> fx.Node:
    """The leading part of a tensor along a dimension that is at least as long; under `free_sizes`."""
    torch._check(length.meta["val"] <= node.meta["val"].shape[dim])  # what is inferred of a slice depends on it
    return insert(torch.ops.aten.slice.Tensor, node, dim, 0, length)


def input_of_length(program: Program, wanted: Size, longest: int) -> tuple[fx.Node, int]:
    """The input and its dimension whose size is a free length, at every length up to the longest that there is.

    To ask an input for it keeps nothing alive, as to ask what the length was read off would. The length may be written
    in another way, as ``T**2 // T``.
    """
    for node in program.graph.find_nodes(op="placeholder"):
        for dim, size in enumerate(sizes(node)):
            if wanted == size or _is_equal(wanted, size, longest):
                return node, dim
    raise AssertionError(f"no input has the length {wanted}")  # it would not have stayed free


def _is_equal(wanted: Size, size: Size, longest: int) -> bool:
    if not isinstance(size, sympy.Symbol) or sympy.sympify(wanted).free_symbols != {size}:
        return False
    return all(sympy.sympify(wanted).xreplace({size: sympy.Integer(n)}) == n for n in range(1, longest + 1))


def put_tensor(program: Program, path: str, tensor: torch.Tensor) -> None:
    """Put a parameter or a persistent buffer at a path of the tree, making plain containers on the way."""
    *owners, name = path.split(".")
    owner: torch.nn.Module = program.module
    for part in owners:
        if owner._modules.get(part) is None:
            owner.add_module(part, torch.nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(tensor, torch.nn.Parameter):
        owner.register_parameter(name, tensor)
    else:
        owner.register_buffer(name, tensor)


def read_tensor(program: Program, path: str, before: fx.Node) -> fx.Node:
    """A node in front of another one that reads a parameter or buffer of the tree."""
    tensor = get_attribute(program.module, path)
    with program.graph.inserting_before(before):
        made = program.graph.get_attr(path)
    values = (node.meta.get("val") for node in program.graph.nodes)
    with next(value.fake_mode for value in values if isinstance(value, FakeTensor)):
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        made.meta["val"] = torch.nn.Parameter(value, tensor.requires_grad) if is_parameter else value
    return made
