"""The flat program behind a rewritten model, without its tensors: what a later pass starts from."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ..emission.graph_codec import decode, encode
from ..emission.rewritten import Rewritten
from ..frontend.lengths import upper_bounds
from ..nodes import evaluate
from ..passes.insert_priors import SitePrior
from ..passes.new_tensors import free_sizes
from ..program import FOLLOWS, CallingConvention, Guard, Program, fixed_size, graph_module
from ..tree import own_copy

#: What is kept of a node's ``meta`` beside its value.
_KEPT = ("nn_module_stack", "stack_trace", FOLLOWS)


@dataclasses.dataclass
class Blueprint:
    """The graph of a rewritten model before its layers were outlined, and what a program has beside its tensors.

    The tensors are those that the model has when it is asked for: `program` puts them in by their paths. So training,
    copies, and conversions of the model need not know of it. In a pickle the values of nodes are left out; they are
    inferred again.
    """

    graph: fx.Graph
    call: CallingConvention
    guards: tuple[Guard, ...]
    name: str
    non_persistent: frozenset[str]
    layerdrop: Mapping[str, float]
    called: frozenset[str]
    layer_paths: tuple[str, ...]
    priors: tuple[SitePrior, ...]

    @staticmethod
    def of(program: Program, layer_paths: tuple[str, ...], priors: tuple[SitePrior, ...]) -> Blueprint:
        """The blueprint of a program that is about to be emitted."""
        called = frozenset(str(node.target) for node in program.graph.find_nodes(op="call_module"))
        graph = program.copy().graph
        rest = (program.call, program.guards, program.name, program.non_persistent, program.layerdrop)
        return Blueprint(graph, *rest, called, layer_paths, priors)

    def program(self, model: Rewritten) -> Program:
        """The program, with the parameters, buffers and modules that the model has now."""
        tree = _tree(model, self.called)
        graph = fx.Graph()
        output = graph.graph_copy(self.graph, {})
        graph.output(output).meta = copy.copy(self.graph.output_node().meta)
        module = graph_module(tree, graph)
        return Program(
            module,
            self.call,
            self.guards,
            self.name,
            non_persistent=self.non_persistent,
            originals=dict(model.named_modules(remove_duplicate=False)),
            layerdrop=self.layerdrop,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Blueprint:
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        graph = state.pop("graph")
        state["_rows"] = encode(graph)
        state["_meta"] = [{key: node.meta[key] for key in _KEPT if key in node.meta} for node in graph.nodes]
        state["_inputs"] = [_portable(node.meta["val"]) for node in graph.find_nodes(op="placeholder")]
        state["_tensors"] = [_portable(node.meta["val"]) for node in graph.find_nodes(op="get_attr")]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows, metas, inputs, tensors = (state.pop(key) for key in ("_rows", "_meta", "_inputs", "_tensors"))
        self.__dict__.update(state)
        self.graph = decode(rows)
        for node, meta in zip(self.graph.nodes, metas, strict=True):
            node.meta.update(meta)
        with free_sizes():
            self._infer(inputs, tensors)

    def _infer(self, inputs: list[_Portable], tensors: list[_Portable]) -> None:
        """Give every node its value again: fake tensors, with free sizes where they were free."""
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        known: dict[str, torch.SymInt] = {}
        bounds = upper_bounds(self.guards)
        pairs = zip(self.graph.find_nodes(op="placeholder"), self.call.leaves, inputs, strict=True)
        for node, leaf, spec in pairs:
            node.meta["val"] = value = _fake_input(mode, spec, leaf.name, known)
            for dim, size in enumerate(value.shape):
                if (leaf.name, dim) in bounds:
                    torch._check(size <= bounds[leaf.name, dim])
        for node, spec in zip(self.graph.find_nodes(op="get_attr"), tensors, strict=True):
            with mode:
                value = torch.empty(list(spec.sizes), dtype=spec.dtype, device=spec.device)  # type: ignore[arg-type]
                node.meta["val"] = torch.nn.Parameter(value, spec.requires_grad) if spec.is_parameter else value
        for node in self.graph.nodes:
            if node.op == "call_function":
                assert callable(node.target)
                with mode:  # in which a range of a free length has that length, too
                    node.meta["val"] = evaluate(node.target, node.args, dict(node.kwargs))
            elif node.op == "call_module":  # dropout, a norm in its mode, or a probability
                node.meta["val"] = node.all_input_nodes[0].meta["val"] if node.all_input_nodes else 0.0


@dataclasses.dataclass(frozen=True)
class _Portable:
    """A value of a node that can be pickled: sizes are numbers, or expressions of free ones with their hints."""

    sizes: tuple[int | tuple[str, int], ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    is_parameter: bool


def _portable(value: torch.Tensor) -> _Portable:
    def size(number: Any) -> int | tuple[str, int]:
        known = fixed_size(number)
        return (str(number.node.expr), int(number.node.hint)) if known is None else known

    is_parameter = isinstance(value, torch.nn.Parameter)
    sizes = tuple(map(size, value.shape))
    return _Portable(sizes, value.dtype, value.device, value.requires_grad, is_parameter)


def _fake_input(mode: FakeTensorMode, spec: _Portable, name: str, known: dict[str, torch.SymInt]) -> torch.Tensor:
    """A fake input; sizes that had one expression have one again."""
    dims = [DimDynamic.STATIC if isinstance(size, int) else DimDynamic.DYNAMIC for size in spec.sizes]
    hints = [size if isinstance(size, int) else size[1] for size in spec.sizes]
    example = torch.empty(hints, dtype=spec.dtype, device="meta")
    context: Any = StatelessSymbolicContext(dynamic_sizes=dims)
    value = mode.from_tensor(example, symbolic_context=context, source=ConstantSource(name))
    for dim, size in enumerate(spec.sizes):
        if not isinstance(size, int):
            own: Any = value.shape[dim]
            torch._check(own == known.setdefault(size[0], own))
    with mode:
        return torch.empty(value.shape, dtype=spec.dtype, device=spec.device)


def _tree(model: torch.nn.Module, called: frozenset[str], path: str = "") -> torch.nn.Module:
    """Containers with the tensors that a model has at the same paths, and the modules that the graph calls."""
    here = torch.nn.Module()
    for key in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        here.__dict__[key] = copy.copy(model.__dict__[key])
    here.__dict__.update({key: value for key, value in model.__dict__.items() if isinstance(value, torch.Tensor)})
    for name, child in model._modules.items():
        full = f"{path}.{name}" if path else name
        if child is not None and "@" not in name:
            here.add_module(name, own_copy(child) if full in called else _tree(child, called, full))
    return here
