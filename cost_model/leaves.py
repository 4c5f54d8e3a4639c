"""The work of leaf modules that a graph calls: Linear and convolutions, as their operators' formulas give it."""

from __future__ import annotations

import math

import sympy
import torch
from torch import fx

from ..errors import UnsupportedError
from .sizes import shape

_CONTRACTIONS = {
    torch.nn.Linear: "aten.linear",
    torch.nn.Conv1d: "aten.conv1d",
    torch.nn.Conv2d: "aten.conv2d",
    torch.nn.Conv3d: "aten.conv3d",
}


def leaf_macs(module: torch.nn.Module, node: fx.Node) -> tuple[str, sympy.Expr]:
    """The operator that a called leaf module amounts to, and its multiply-accumulates.

    Every output element contracts one filter: the weight's size over its number of output features. A lookup in an
    embedding, Dropout and normalisation have none.

    Raises:
        UnsupportedError: for a module with weight matrices of which it is not known what it does with them.
    """
    name = _CONTRACTIONS.get(type(module))
    if name is not None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        return name, sympy.prod(shape(node)) * math.prod(weight.shape[1:])
    matrices = [name for name, parameter in module.named_parameters() if parameter.ndim > 1]
    if matrices and not isinstance(module, torch.nn.Embedding):
        raise UnsupportedError(
            f"The module {type(module).__name__} at {node.target} has weight matrices ({', '.join(matrices)}), but no "
            "graph that shows what it does with them, so its cost is not known. Use a capture that traces through it."
        )
    return "", sympy.Integer(0)
