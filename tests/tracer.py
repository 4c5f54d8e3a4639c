"""Graphs over meta tensors, built by hand, node by node."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxreuse.nodes import evaluate
from fxreuse.program import Argument, CallingConvention, Leaf, Program


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


class Tracer:
    """Builds a graph over meta tensors, by hand, node by node."""

    def __init__(self, root: torch.nn.Module | None = None) -> None:
        self.root = root or torch.nn.Module()
        self.graph = fx.Graph()

    def input(self, *shape: int, name: str = "x", dtype: torch.dtype = torch.float32) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = meta(*shape, dtype=dtype)
        return node

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = evaluate(target, args, kwargs)
        return node

    def call(self, path: str, inner: torch.nn.Module, *args: fx.Node) -> fx.Node:
        self.root.add_submodule(path, inner) if "." in path else self.root.add_module(path, inner)
        node = self.graph.call_module(path, args)
        graph = getattr(inner, "graph", None)
        results = graph.output_node().args[0] if graph else args[0]
        node.meta["val"] = fx.node.map_arg(results, lambda result: result.meta["val"])
        return node

    def module(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(outputs if len(outputs) > 1 else outputs[0])
        return fx.GraphModule(self.root, self.graph)

    def program(self, *outputs: fx.Node) -> Program:
        names = [str(node.target) for node in self.graph.find_nodes(op="placeholder")]
        leaf = torch.utils._pytree.tree_structure(0)
        arguments = tuple(Argument(name, leaf, (Leaf(name, 2),)) for name in names)
        return Program(self.module(*outputs), CallingConvention((), arguments, leaf), (), "by hand")
