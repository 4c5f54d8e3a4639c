"""What `fxreuse.apply` returns: modules that run a graph, and the outermost one that is called as the original was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..frontend.guards import checker
from ..program import CallingConvention, Guard, Program
from ..record import Record
from . import calling
from .graph_codec import decode, encode
from .runnable import function_of


class GraphRunner(torch.nn.Module):
    """A module whose forward is the code of an `fx.Graph` over its own parameters and submodules.

    ``graph`` and ``code`` show what it computes. Copies and pickles keep hooks, attributes and shared parameters as any
    module's do.
    """

    _RUNTIME: ClassVar[tuple[str, ...]] = ("_graph", "_run")
    _run: Callable[..., Any]

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self._set_graph(graph)

    def _set_graph(self, graph: fx.Graph) -> None:
        graph.set_codegen(fx.graph.CodeGen())
        self.__dict__["_graph"] = graph
        self.__dict__["_run"] = function_of(graph)

    @property
    def graph(self) -> fx.Graph:
        """The graph that this module runs."""
        return self.__dict__["_graph"]

    @property
    def code(self) -> str:
        """The graph as Python source."""
        return self.graph.python_code("self").src

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key not in self._RUNTIME}
        state["_rows"] = encode(self.graph)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows = state.pop("_rows")
        super().__setstate__(state)
        self._set_graph(decode(rows))

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphRunner:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        graph = fx.Graph()
        output = graph.graph_copy(self.graph, {})
        graph.output(output).meta = copy.copy(self.graph.output_node().meta)
        state = {key: value for key, value in self.__dict__.items() if key not in self._RUNTIME}
        twin.__dict__.update(copy.deepcopy(state, memo))
        twin._set_graph(graph)
        return twin


class Layer(GraphRunner):
    """One layer of a stack: takes the hidden states first, and returns them first.

    A follower also takes its leader's attention map (or queries and keys); a leader returns what later layers need.
    ``layerdrop`` is the probability of being skipped in training mode (None: never, and nothing is drawn).
    """

    def __init__(self, graph: fx.Graph, original: str, layerdrop: float | None = None) -> None:
        super().__init__(graph)
        self.original = original
        self.layerdrop = layerdrop

    def _get_name(self) -> str:
        return self.original

    def forward(self, hidden_states: torch.Tensor, *others: Any) -> Any:
        """Run the layer, or skip it as LayerDrop does in training mode."""
        if self.training and self.layerdrop is not None and torch.rand([]) < self.layerdrop:
            return hidden_states
        return self._run(self, hidden_states, *others)

    def extra_repr(self) -> str:
        """What a layer takes and gives, by name."""
        takes = [str(node.name) for node in self.graph.nodes if node.op == "placeholder"]
        gives = [node.name for node in self.graph.output_node().all_input_nodes]
        text = f"takes {', '.join(takes)}; gives {', '.join(gives)}"
        return text if self.layerdrop is None else f"{text}; layerdrop={self.layerdrop}"


class Rewritten(GraphRunner):
    """A rewritten model. It is called as the original is, and gives back the same class of output.

    ``record`` says what was done; `fxreuse.describe` returns it. Calls are checked against what the capture assumed: a
    size or an argument that it did not see is refused by name.
    """

    _RUNTIME: ClassVar[tuple[str, ...]] = ("_graph", "_run", "_check", "forward")
    blueprint: Any  # a Blueprint, where there are priors to prune by
    _check: Callable[..., None]

    def __init__(
        self, graph: fx.Graph, name: str, convention: CallingConvention, guards: tuple[Guard, ...], record: Record
    ) -> None:
        super().__init__(graph)
        self.name = name
        self.convention = convention
        self.guards = guards
        self.record = record
        self.blueprint = None
        self._set_call()

    def _set_call(self) -> None:
        self.__dict__["_check"] = checker(self.guards, self.convention.leaves, self.name)
        self.__dict__["forward"] = calling.make_forward(self, self.convention, self.name)

    def run(self, leaves: tuple[torch.Tensor, ...]) -> Any:
        """Check the sizes, run the graph, and put the outputs into the original's structure."""
        self._check(*leaves)
        return pytree.tree_unflatten(self._run(self, *leaves), self.convention.out_spec)

    @property
    def program(self) -> Program:
        """The outer graph as a program, for the cost model to walk; its layers are calls of modules with graphs."""
        return Program(cast(fx.GraphModule, self), self.convention, self.guards, self.name)

    def _get_name(self) -> str:
        return self.name

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_call()

    def _replicate_for_data_parallel(self) -> Rewritten:
        twin = super()._replicate_for_data_parallel()
        twin._set_call()
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewritten:
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, Rewritten)
        twin._set_call()
        return twin
