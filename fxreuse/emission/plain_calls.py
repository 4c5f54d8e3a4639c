"""Graphs as they are run: operators called the way that costs least in Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

_aten = torch.ops.aten
# The same operators under PyTorch's public names. A call of an overload takes one to five microseconds longer.
_PLAIN: Mapping[Any, Callable[..., Any]] = {
    _aten.add.Tensor: torch.add,
    _aten.bmm.default: torch.bmm,
    _aten.cat.default: torch.cat,
    _aten.div.Tensor: torch.div,
    _aten.flatten.using_ints: torch.flatten,
    _aten.gelu.default: F.gelu,
    _aten.index_select.default: torch.index_select,
    _aten.linear.default: F.linear,
    _aten.matmul.default: torch.matmul,
    _aten.mul.Tensor: torch.mul,
    _aten.permute.default: torch.permute,
    _aten.relu.default: torch.relu,
    _aten.reshape.default: torch.reshape,
    _aten.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
    _aten.sigmoid.default: torch.sigmoid,
    _aten.split_with_sizes.default: torch.split_with_sizes,
    _aten.sub.Tensor: torch.sub,
    _aten.sym_size.int: torch.Tensor.size,
    _aten.tanh.default: torch.tanh,
    _aten.transpose.int: torch.transpose,
    _aten.type_as.default: torch.Tensor.type_as,
    _aten.unbind.int: torch.unbind,
    _aten.unflatten.int: torch.unflatten,
    _aten.unsqueeze.default: torch.unsqueeze,
}


def use_plain_calls(graph: fx.Graph) -> None:
    """Call operators by their public names, in place. Exact: they are the same ones.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> _ = graph.output(graph.call_function(_aten.transpose.int, (x, 0, 1)))
    >>> use_plain_calls(graph)
    >>> [node.target is torch.transpose for node in graph.nodes]
    [False, True, False]
    """
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _PLAIN.get(node.target, node.target)
