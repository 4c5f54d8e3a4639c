"""What every node of a program says of its value, against what its operator makes of the values that it reads."""

from __future__ import annotations

import torch
from torch import fx

from fxreuse.nodes import evaluate
from fxreuse.program import Program, fixed_size, get_attribute


def described(value: object) -> object:
    if isinstance(value, torch.Tensor):
        sizes = (size if fixed_size(size) is None else fixed_size(size) for size in value.shape)
        return [str(size) for size in sizes], value.dtype
    if isinstance(value, (tuple, list)):
        return [described(part) for part in value]
    return str(value)


def assert_values_known(program: Program) -> None:
    for node in program.graph.nodes:
        if node.op == "get_attr":
            actual: object = get_attribute(program.module, node.target)
        elif node.op == "call_function":
            actual = evaluate(node.target, node.args, dict(node.kwargs))
        elif node.op == "call_module":
            actual = evaluate(program.module.get_submodule(node.target), node.args, dict(node.kwargs))
        else:
            continue
        assert isinstance(node, fx.Node)
        assert described(node.meta["val"]) == described(actual), node.format_node()
