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
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils import _pytree as pytree

from .nodes import share_values
from .record import Note

# ``meta`` key of nodes that name a floating dtype because the model's parameters or inputs have it.
FOLLOWS = "follows_dtype"


@dataclasses.dataclass(frozen=True)
class Guard:
    """A condition on the inputs under which the graph is the model.

    ``source`` is a Python expression that reads sizes as ``size('input_ids', 1)``; ``text`` says it in words.
    """

    source: str
    text: str

    def sizes(self) -> tuple[tuple[str, int], ...]:
        """The (leaf, dimension) pairs that the condition speaks of, each once, in order."""
        found = re.findall(r"size\((\"[^\"]*\"|'[^']*'), (\d+)\)", self.source)
        return tuple(dict.fromkeys((leaf[1:-1], int(dim)) for leaf, dim in found))


@dataclasses.dataclass(frozen=True)
class Argument:
    """One argument that the capture saw: its pytree structure and, for every leaf, a tensor's name or a constant.

    ``leaves`` has a `Leaf` for a tensor; anything else in it is a constant that a call has to repeat.
    """

    name: str
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A tensor among the inputs, by name: ``input_ids``, or ``inputs['x'][0]`` for one inside a structure.

    ``kind`` is that of its numbers, ``"bool"``, ``"integer"``, ``"floating"`` or ``"complex"``: models branch on it (a
    mask that is boolean, or added), so a call has to keep it. The width of the numbers is free.
    """

    name: str
    ndim: int
    kind: str = "floating"


def kind_of(dtype: torch.dtype) -> str:
    """The kind of a dtype's numbers.

    >>> kind_of(torch.bfloat16), kind_of(torch.int64), kind_of(torch.bool)
    ('floating', 'integer', 'bool')
    """
    if dtype == torch.bool:
        return "bool"
    return "complex" if dtype.is_complex else "floating" if dtype.is_floating_point else "integer"


@dataclasses.dataclass(frozen=True)
class CallingConvention:
    """How the captured model is called, and what it gives back.

    ``parameters`` is the signature of the original ``forward``. ``arguments`` are those that the capture saw, in
    order; the placeholders of the graph are their tensor leaves. Any other argument was left at its default:
    ``accepted`` has, by name, the values that mean the same (``return_dict=None`` is True where the configuration says
    so).
    """

    parameters: tuple[inspect.Parameter, ...]
    arguments: tuple[Argument, ...]
    out_spec: pytree.TreeSpec
    accepted: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The tensor leaves, in the order of the graph's placeholders."""
        return tuple(leaf for argument in self.arguments for leaf in argument.leaves if isinstance(leaf, Leaf))


@dataclasses.dataclass
class Program:
    """A captured model. See the module's docstring for the form of its graph."""

    module: fx.GraphModule
    call: CallingConvention
    guards: tuple[Guard, ...]
    name: str
    notes: tuple[Note, ...] = ()
    non_persistent: frozenset[str] = frozenset()
    originals: Mapping[str, torch.nn.Module] = dataclasses.field(default_factory=dict)
    mode_modules: Mapping[str, torch.nn.Module] = dataclasses.field(default_factory=dict)
    attention_dropout: Mapping[tuple[str, int], float] = dataclasses.field(default_factory=dict)
    functional_dropout: Mapping[tuple[str, int], float] = dataclasses.field(default_factory=dict)
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
    output = graph.graph_copy(module.graph, {})
    graph.output(output).meta = copy.copy(module.graph.output_node().meta)
    share_values(module.graph, graph)
    return graph_module(share_tree(module), graph)


def graph_module(tree: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph module over a whole tree: what the graph does not read stays, and so does what is not persistent.

    It is compiled when it is first run: passes look at graphs, and most programs never run.
    """
    made = _LazyGraphModule(torch.nn.Module(), fx.Graph())
    for key in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"):
        made.__dict__[key] = tree.__dict__[key]
    made.__dict__.update({key: value for key, value in tree.__dict__.items() if isinstance(value, torch.Tensor)})
    made.graph = graph
    return made


def share_tree(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module tree whose parameters, buffers and tensor attributes are the same objects.

    Modules that have code of their own (Dropout, BatchNorm) are copied one by one; every other one becomes a plain
    container. Graph modules below the root, which export makes of regions, are copied with their graphs.
    """
    if isinstance(module, fx.GraphModule) or type(module) is torch.nn.Module:
        twin = torch.nn.Module()
        twin.__dict__.update({key: value for key, value in module.__dict__.items() if isinstance(value, torch.Tensor)})
    else:
        twin = copy.copy(module)
    for key in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        twin.__dict__[key] = copy.copy(module.__dict__[key])
    twin.__dict__["_modules"] = {
        name: copy_graph_module(child) if isinstance(child, fx.GraphModule) else child and share_tree(child)
        for name, child in module._modules.items()
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


def source_line(node: fx.Node) -> str:
    """The innermost line of the model's own code that a node came from, as ``file:line: code``."""
    trace: Any = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', trace)
    own = [frame for frame in frames if "/torch/" not in frame[0] and not frame[0].startswith("<")] or frames
    return "" if not own else "{}:{}: {}".format(*own[-1])


def tensor_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that a node reads whose value is a tensor."""
    for argument in node.all_input_nodes:
        if isinstance(argument.meta.get("val"), torch.Tensor):
            yield argument


def fixed_size(size: int | torch.SymInt) -> int | None:
    """A size as a number, or None where it is free. Export keeps a size that it fixed as a symbol with one value."""
    if isinstance(size, int):
        return size
    known = size.node.maybe_as_int()
    return None if known is None else int(known)


def input_sizes(program: Program) -> dict[str, str]:
    """Which size of which input each symbol stands for: ``s70`` → ``input_ids.shape[1]``."""
    found: dict[str, str] = {}
    for leaf, node in zip(program.call.leaves, program.graph.find_nodes(op="placeholder"), strict=True):
        for dim, size in enumerate(node.meta["val"].shape):
            if fixed_size(size) is None:
                found.setdefault(str(size.node.expr), f"{leaf.name}.shape[{dim}]")
    return found
