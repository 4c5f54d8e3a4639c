"""What every node of a program says of its value, against what its operator makes of the values that it reads."""

from __future__ import annotations

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor

from fxreuse.layouts.projections import hint, hints
from fxreuse.nodes import evaluate
from fxreuse.program import Program, fixed_size, get_attribute


def described(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return hints(value), [fixed_size(size) is None for size in value.shape], value.dtype
    if isinstance(value, (tuple, list)):
        return [described(part) for part in value]
    return hint(value) if isinstance(value, (int, torch.SymInt)) else str(value)


def assert_values_known(program: Program) -> None:
    """Without guards, and with the dispatcher in Python: looking must not tie sizes to those of the example."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    with mode, mode.shape_env.suppress_guards(), enable_python_dispatcher():
        _compare(program)


def _compare(program: Program) -> None:
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
