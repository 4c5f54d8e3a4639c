"""The program: one flat graph of a model, and everything about the model that the graph alone does not say.

A `Program` is what `capture` makes, what `find` reads, and what every pass takes and returns. Its graph is flat: the
placeholders are the model's input tensors, `get_attr` nodes are parameters, buffers and constants at the original
paths, `call_function` nodes are ATen operators, `call_module` nodes are the modules whose behaviour depends on train
and eval mode. Every node has ``meta["val"]``: a fake tensor whose sizes are symbolic where they are free.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .record import Note


@dataclasses.dataclass(frozen=True)
class Guard:
    """A condition on the inputs under which the graph is the model: ``source`` is a Python expression.

    ``names`` are the inputs it speaks of, ``source`` reads sizes as ``size('input_ids', 1)`` and values of plain
    arguments as ``value('flag')``; ``text`` is the sentence for people.
    """

    source: str
    names: tuple[str, ...]
    text: str


@dataclasses.dataclass(frozen=True)
class CallingConvention:
    """How the captured model is called, and what it gives back.

    ``parameters`` is the signature of the original ``forward``. ``captured`` maps the name of every argument that the
    capture saw to its example value (tensors replaced by None); an argument that is not in it was left at its default.
    ``leaves`` are the names of the tensor leaves, in the order of the graph's placeholders: ``"input_ids"``, or
    ``"inputs['x'][0]"`` for a nested one.
    """

    parameters: tuple[inspect.Parameter, ...]
    captured: Mapping[str, Any]
    in_spec: pytree.TreeSpec
    leaves: tuple[str, ...]
    out_spec: pytree.TreeSpec


@dataclasses.dataclass
class Program:
    """A captured model. See the module's docstring for the form of its graph."""

    module: fx.GraphModule
    call: CallingConvention
    guards: tuple[Guard, ...]
    name: str
    notes: tuple[Note, ...] = ()
    non_persistent: frozenset[str] = frozenset()
    containers: Mapping[str, type[torch.nn.Module]] = dataclasses.field(default_factory=dict)
    layerdrop: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The flat graph."""
        return self.module.graph

    def copy(self) -> Program:
        """A program with a graph and a module tree of its own; parameters and buffers are shared, names are kept."""
        return dataclasses.replace(self, module=copy_graph_module(self.module))

    def node(self, name: str) -> fx.Node:
        """The node of that name."""
        for node in self.graph.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that the graph reads, by path; a tied one appears under each of its paths."""
        found: dict[str, torch.nn.Parameter] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                value = get_attribute(self.module, node.target)
                if isinstance(value, torch.nn.Parameter):
                    found[node.target] = value
            elif node.op == "call_module":
                inner = self.module.get_submodule(node.target)
                found.update({f"{node.target}.{name}": value for name, value in inner.named_parameters()})
        return found

    def check(self) -> None:
        """Raise where an invariant of the graph is broken: `lint`, ``meta["val"]`` everywhere."""
        self.graph.lint()
        missing = [n.name for n in self.graph.nodes if n.op != "output" and "val" not in n.meta]
        if missing:
            raise AssertionError(f"nodes without meta['val']: {missing}")


def copy_graph_module(module: fx.GraphModule) -> fx.GraphModule:
    """A graph module with the same graph (node names and meta kept) over a tree of its own that shares all tensors."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, mapping)
    result = graph.output(output)
    result.meta = copy.copy(module.graph.output_node().meta)
    return fx.GraphModule(share_tree(module), graph, module.__class__.__name__)


def share_tree(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module tree whose parameters, buffers and leaf attributes are the same objects.

    Modules that have code of their own (Dropout, BatchNorm) are copied one by one, hooks left behind; every other one
    becomes a plain container.
    """
    if isinstance(module, fx.GraphModule) or type(module) is torch.nn.Module:
        twin = torch.nn.Module()
        for key, value in module.__dict__.items():
            if isinstance(value, torch.Tensor):
                twin.__dict__[key] = value
    else:
        twin = copy.copy(module)
        for hooks in [key for key in twin.__dict__ if key.endswith("_hooks")]:
            twin.__dict__[hooks] = type(twin.__dict__[hooks])()
    twin.__dict__["_parameters"] = dict(module._parameters)
    twin.__dict__["_buffers"] = dict(module._buffers)
    twin.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    twin.__dict__["_modules"] = {
        name: None if child is None else share_tree(child) for name, child in module._modules.items()
    }
    twin.training = module.training
    return twin


def get_attribute(module: torch.nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def module_path(node: fx.Node) -> str:
    """The path of the innermost module call that the node came from; ``a.b@1`` is the second call of ``a.b``.

    Empty for a node of the outermost module or of none.
    """
    stack = module_stack(node)
    return stack[-1] if stack else ""


def module_stack(node: fx.Node) -> list[str]:
    """The paths of the module calls around a node, outermost first, each with the number of the call if not the first.

    The outermost module itself, whose path is empty, is left out.
    """
    paths = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        if path:
            number = key.partition("@")[2]
            paths.append(f"{path}@{number}" if number else path)
    return paths


def tensor_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that a node reads whose value is a tensor."""
    for argument in node.all_input_nodes:
        if isinstance(argument.meta.get("val"), torch.Tensor):
            yield argument
