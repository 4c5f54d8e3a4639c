"""The module tree of a program: where its modules and parameters are, and how to add and remove them."""

from __future__ import annotations

import copy

import torch
from torch import fx

from .program import Program, get_attribute


def place(root: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    """Put a module at a path, making plain containers on the way."""
    *owners, name = path.split(".")
    owner = root
    for part in owners:
        if owner._modules.get(part) is None:
            owner.add_module(part, torch.nn.Module())
        owner = owner.get_submodule(part)
    owner.add_module(name, module)


def free_path(root: torch.nn.Module, owner: str, name: str) -> str:
    """A path for a new submodule of ``owner`` (the number of the call cut off) that nothing has yet."""
    prefix = owner.partition("@")[0]
    number = 0
    while True:
        candidate = f"{prefix}.{name}" if prefix else name
        candidate += f"_{number}" if number else ""
        if not _taken(root, candidate):
            return candidate
        number += 1


def _taken(root: torch.nn.Module, path: str) -> bool:
    owner = root
    for part in path.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


def own_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a leaf module in eval mode that shares its parameters and buffers, without hooks."""
    twin = copy.copy(module)
    for key, value in module.__dict__.items():
        if "_hooks" in key:
            twin.__dict__[key] = type(value)()
    for key in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        twin.__dict__[key] = copy.copy(module.__dict__[key])
    twin.__dict__.pop("forward", None)
    twin.training = False
    return twin


def reads(program: Program) -> dict[str, torch.Tensor]:
    """The parameters and buffers that the graph reads, by path, those of called modules included."""
    found: dict[str, torch.Tensor] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            value = get_attribute(program.module, node.target)
            if isinstance(value, torch.Tensor):
                found[node.target] = value
        elif node.op == "call_module":
            inner = program.module.get_submodule(node.target)
            tensors = (*inner.named_parameters(), *inner.named_buffers())
            found.update({f"{node.target}.{name}": value for name, value in tensors})
    return found


def drop(program: Program, paths: set[str]) -> None:
    """Take parameters and buffers out of the tree, and the containers and called modules that nobody needs then."""
    for path in paths:
        owner, _, name = path.rpartition(".")
        module = program.module.get_submodule(owner)
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
        module.__dict__.pop(name, None)
    called = {str(node.target) for node in program.graph.find_nodes(op="call_module")}
    touched = {path.rpartition(".")[0] for path in paths}
    _prune(program.module, "", called, touched)


def _prune(module: torch.nn.Module, path: str, called: set[str], touched: set[str]) -> None:
    for name, child in list(module._modules.items()):
        full = f"{path}.{name}" if path else name
        if child is None:
            continue
        _prune(child, full, called, touched)
        plain = type(child) is torch.nn.Module and full in touched
        idle = type(child) is not torch.nn.Module and full not in called and not isinstance(child, fx.GraphModule)
        constants = any(isinstance(value, torch.Tensor) for value in child.__dict__.values())
        empty = not (child._parameters or child._buffers or child._modules or constants)
        if empty and (plain or idle):
            del module._modules[name]
            touched.add(path)
