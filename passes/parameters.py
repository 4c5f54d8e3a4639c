"""Nodes that read parameters and constants: adding them, and having one for all readers."""

from __future__ import annotations

import torch
from torch import fx

from fxreuse.nodes import replace
from fxreuse.program import Program
from fxreuse.tree import place


def at_top(program: Program, path: str) -> fx.Node:
    """The one node that reads a parameter: before everything that is computed, in place of all that read it."""
    first, *others = [node for node in program.graph.find_nodes(op="get_attr") if str(node.target) == path]
    for node in others:
        replace(node, first)
    start = _start(program.graph)
    if start.next is not first:
        start.append(first)
    return first


def add_parameter(program: Program, path: str, tensor: torch.Tensor, like: fx.Node) -> fx.Node:
    """A new parameter at a path, and the node that reads it; it learns if the parameter that ``like`` reads does."""
    learns = bool(like.meta["val"].requires_grad)
    parameter = torch.nn.Parameter(tensor, learns)
    owner, name = _owner(program, path)
    owner.register_parameter(name, parameter)
    node = _read(program, path)
    with like.meta["val"].fake_mode:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        node.meta["val"] = torch.nn.Parameter(fake, learns)
    return node


def add_index(program: Program, path: str, index: torch.Tensor, like: fx.Node) -> fx.Node:
    """A constant of indices at a path, which is no part of a state dict, and the node that reads it."""
    owner, name = _owner(program, path)
    value = like.meta["val"]
    owner.register_buffer(name, index.to(value.device), persistent=False)
    program.non_persistent = program.non_persistent | {path}
    node = _read(program, path)
    with value.fake_mode:
        node.meta["val"] = torch.empty(index.shape, dtype=index.dtype, device=value.device)
    return node


def _owner(program: Program, path: str) -> tuple[torch.nn.Module, str]:
    """The module at the path above, made where there is none."""
    above, _, name = path.rpartition(".")
    try:
        return program.module.get_submodule(above), name
    except AttributeError:
        place(program.module, above, torch.nn.Module())
        return program.module.get_submodule(above), name


def _read(program: Program, path: str) -> fx.Node:
    with program.graph.inserting_after(_start(program.graph)):
        return program.graph.get_attr(path)


def _start(graph: fx.Graph) -> fx.Node:
    """The last placeholder: what stands behind it stands before everything that is computed."""
    return list(graph.find_nodes(op="placeholder"))[-1]
