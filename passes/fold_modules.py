"""Fold operators back into the torch.nn modules that they came from: Linear, LayerNorm, Embedding, convolutions."""

from __future__ import annotations

import copy

import torch
from torch import fx

from fxreuse.nodes import is_call, replace
from fxreuse.program import Program, module_path, module_stack
from fxreuse.tree import own_copy, place

from .steps import Pass

_aten = torch.ops.aten
# module class → (operator, place of the input, of the weight and of the bias among its arguments)
_LEAVES = {
    torch.nn.Linear: (_aten.linear.default, 0, 1, 2),
    torch.nn.LayerNorm: (_aten.layer_norm.default, 0, 2, 3),
    torch.nn.Embedding: (_aten.embedding.default, 1, 0, None),
    torch.nn.Conv1d: (_aten.conv1d.default, 0, 1, 2),
    torch.nn.Conv2d: (_aten.conv2d.default, 0, 1, 2),
}


@Pass
def fold_modules(program: Program) -> None:
    """``linear(x, P.weight, P.bias)`` becomes a call of the Linear module ``P``. Exact tier.

    Sound because the operator was recorded inside the call of ``P``, a module of exactly that class, whose forward is
    that operator on its own parameters. Hooks, adapters and quantization filters then find the modules that they know.
    The module is a copy that shares its parameters with the original. Modules that are called several times are left
    as they are: their parameters stay in one place and are passed to each call.
    """
    repeated = {path.partition("@")[0] for node in program.graph.nodes for path in module_stack(node) if "@" in path}
    for node in list(program.graph.nodes):
        if not repeated.isdisjoint(module_stack(node)) or "@" in module_path(node):
            continue
        path = module_path(node).partition("@")[0]
        original = program.originals.get(path)
        shape = _LEAVES.get(type(original))
        if original is None or shape is None or not is_call(node, shape[0]) or not _runs_as_its_class(original):
            continue
        _, source, weight, bias = shape
        if not _reads(node, weight, f"{path}.weight") or not _reads_bias(node, bias, path, original):
            continue
        _take_over(program, path, original)
        with program.graph.inserting_before(node):
            made = program.graph.call_module(path, (node.args[source],))
        made.meta = copy.copy(node.meta)
        replace(node, made)
    for node in list(program.graph.find_nodes(op="get_attr")):
        if not node.users:
            program.graph.erase_node(node)


def _runs_as_its_class(module: torch.nn.Module) -> bool:
    """Whether a module's forward is its class's, on the operator alone: no patch, no padding that is done before."""
    return "forward" not in module.__dict__ and getattr(module, "padding_mode", "zeros") == "zeros"


def _reads(node: fx.Node, position: int, path: str) -> bool:
    value = node.args[position] if len(node.args) > position else None
    return isinstance(value, fx.Node) and value.op == "get_attr" and value.target == path


def _reads_bias(node: fx.Node, position: int | None, path: str, original: torch.nn.Module) -> bool:
    if position is None or getattr(original, "bias", None) is None:
        return position is None or len(node.args) <= position or node.args[position] is None
    return _reads(node, position, f"{path}.bias")


def _take_over(program: Program, path: str, original: torch.nn.Module) -> None:
    """Put a copy of the original module at its path, with the parameters and buffers that the program has there."""
    here = program.module.get_submodule(path)
    if type(here) is not torch.nn.Module:
        return
    twin = own_copy(original)
    twin._parameters.update(here._parameters)
    twin._buffers.update(here._buffers)
    twin._non_persistent_buffers_set |= here._non_persistent_buffers_set
    if isinstance(twin, torch.nn.Linear):
        twin.out_features, twin.in_features = twin.weight.shape
    place(program.module, path, twin)
