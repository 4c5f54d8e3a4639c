"""Graphs as Python functions, in the form that costs least to call."""

from __future__ import annotations

import builtins
import itertools
import keyword
import linecache
import re
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from .plain_calls import use_plain_calls

# What names mean in the code that fx writes.
_TAKEN = frozenset({"self", "torch", "device", "inf", "nan", "fx_pytree", "pytree", *keyword.kwlist, *dir(builtins)})
_numbers = itertools.count()
_Key = tuple[str, tuple[tuple[str, int], ...]]
# Functions by their source and what it refers to: layers that are built alike run the same code.
_known: weakref.WeakValueDictionary[_Key, Any] = weakref.WeakValueDictionary()


def function_of(graph: fx.Graph) -> Callable[..., Any]:
    """A graph as a function of the module that owns what it reads, and of its inputs; tracebacks show its lines.

    It computes what the graph does, with operators called by their public names, and parameters read straight from
    where modules keep them. Values are named without the numbers of layers, so that layers that are alike share one
    function: Python adapts to it once, and it stays in cache.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> weight = graph.get_attr("linear.weight")
    >>> _ = graph.output(graph.call_function(torch.ops.aten.linear.default, (x, weight)))
    >>> owner = torch.nn.ModuleDict({"linear": torch.nn.Linear(3, 2)})
    >>> function_of(graph)(owner, torch.zeros(4, 3)).shape
    torch.Size([4, 2])
    """
    plain = fx.Graph()
    plain.output(plain.graph_copy(graph, {}))
    use_plain_calls(plain)
    reads = _take_reads(plain)
    _name_alike(plain, reads)
    plain.set_codegen(_ReadingFirst({node.name: path for node, path in reads.items()}))
    code = plain.python_code("self")
    key = (code.src, tuple(sorted((name, id(value)) for name, value in code.globals.items())))
    found = _known.get(key)
    if found is None:
        found = _known[key] = _compile(code.src, {**code.globals, "_read": _read, "_module": _module})
    return found


def _compile(source: str, scope: dict[str, Any]) -> Any:
    filename = f"<fxreuse graph {next(_numbers)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), scope)
    return scope["forward"]


def _take_reads(graph: fx.Graph) -> dict[fx.Node, str]:
    """Inputs in place of the nodes that read the module, with the paths that they read."""
    reads: dict[fx.Node, str] = {}
    places = graph.find_nodes(op="placeholder")
    for node in sorted(graph.find_nodes(op="get_attr"), key=lambda node: str(node.target)):
        with graph.inserting_after(places[-1]) if places else graph.inserting_before(next(iter(graph.nodes))):
            read = graph.placeholder(node.name)
        places = [read]
        node.replace_all_uses_with(read)
        graph.erase_node(node)
        reads[read] = str(node.target)
    return reads


def _name_alike(graph: fx.Graph, reads: Mapping[fx.Node, str]) -> None:
    """Names without the numbers of layers, but with those that keep them apart."""
    taken: dict[str, int] = {}
    for node in graph.nodes:
        path = reads.get(node, node.name).replace(".", "_")
        name = re.sub(r"_?\d+", "", path).strip("_").lower() or "value"
        name += "_" if name in _TAKEN else ""
        taken[name] = taken.get(name, -1) + 1
        node.name = f"{name}_{taken[name]}" if taken[name] else name
        if node.op == "placeholder":
            node.target = node.name


class _ReadingFirst(fx.graph.CodeGen):
    """Code whose function takes the inputs that are no reads, and begins with the reads."""

    def __init__(self, reads: Mapping[str, str]) -> None:
        super().__init__()
        self._reads = reads

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        """The first line, and a line for each read and for each module that has what is read."""
        inputs = [name for name in free_vars if name not in self._reads]
        lines = [super().gen_fn_def(inputs, maybe_return_annotation, **options)]
        owners = {"": "self"}
        for name, path in self._reads.items():
            above, _, leaf = path.rpartition(".")
            lines += _owners(owners, above)
            lines.append(f"    {name} = _read({owners[above]}, {leaf!r})")
        return "\n".join(lines)


def _owners(known: dict[str, str], path: str) -> list[str]:
    """Lines that give a name to the module at a path, and to those above it."""
    if path in known:
        return []
    above, _, leaf = path.rpartition(".")
    lines = _owners(known, above)
    known[path] = f"_owner_{len(known)}"
    return [*lines, f"    {known[path]} = _module({known[above]}, {leaf!r})"]


def _read(owner: torch.nn.Module, name: str) -> Any:
    """A parameter. A look into the dictionary takes a third of the time of an attribute of a module."""
    found = owner._parameters.get(name)
    return getattr(owner, name) if found is None else found


def _module(owner: torch.nn.Module, name: str) -> Any:
    found = owner._modules.get(name)
    return getattr(owner, name) if found is None else found
