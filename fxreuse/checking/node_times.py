"""How long every node of a rewritten model takes: measured while the model runs, one node after the other."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from ..emission.rewritten import GraphRunner
from ..nodes import map_nodes
from .measure import Spread

#: The path of the outlined layer that a node is in, and the node's name.
NodeKey = tuple[str, str]


def node_times(model: GraphRunner, call: Callable[[], object], rounds: int = 5) -> dict[NodeKey, float]:
    """The seconds of every node, the median over some calls.

    The graphs are run node by node, outlined layers as well, and each value is let go of after its last use, as in the
    code that they otherwise run. On an accelerator every node is waited for.

    Arguments:
        model: a rewritten model. While this runs, its graphs are run in another way; afterwards it is as it was.
        call: calls it, or what contains it.
        rounds: how many calls are timed, after one that warms up.

    >>> import fxreuse
    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    >>> example = torch.randn(2, 5, 16)
    >>> small = fxreuse.apply(model, "2x1", example)
    >>> times = node_times(small, lambda: small(example), rounds=1)
    >>> sorted({path for path, _ in times})
    ['', 'layers.0', 'layers.1']
    """
    timer = _Timer()
    with timer.installed(model):
        call()
        timer.seconds.clear()
        for _ in range(rounds):
            call()
    return {key: Spread.of(values).median for key, values in timer.seconds.items()}


class _Timer:
    """Runs graphs and keeps what each node took, call by call."""

    def __init__(self) -> None:
        self.seconds: defaultdict[NodeKey, list[float]] = defaultdict(list)
        self._path: list[str] = []

    @contextmanager
    def installed(self, model: GraphRunner) -> Iterator[None]:
        """With every graph of a model run by this timer."""
        runners = [module for module in model.modules() if isinstance(module, GraphRunner)]
        before = [runner.__dict__["_run"] for runner in runners]
        for runner in runners:
            runner.__dict__["_run"] = self._runner(runner.graph)
        try:
            yield
        finally:
            for runner, run in zip(runners, before, strict=True):
                runner.__dict__["_run"] = run

    def _runner(self, graph: fx.Graph) -> Callable[..., Any]:
        last = {source: node for node in graph.nodes for source in node.all_input_nodes}
        dead: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
        for source, user in last.items():
            dead[user].append(source)

        def run(module: torch.nn.Module, *inputs: Any) -> Any:
            values: dict[fx.Node, Any] = {}
            given = iter(inputs)
            for node in graph.nodes:
                if node.op == "output":
                    return map_nodes(node.args[0], values.__getitem__)
                values[node] = next(given, None) if node.op == "placeholder" else self._timed(module, node, values)
                for source in dead[node]:
                    del values[source]
            return None

        return run

    def _timed(self, module: torch.nn.Module, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return _attribute(module, str(node.target))
        args, kwargs = map_nodes((node.args, node.kwargs), values.__getitem__)
        if node.op == "call_module":
            called = module.get_submodule(str(node.target))
            if isinstance(called, GraphRunner):
                return self._inside(str(node.target), called, args, kwargs)
            function: Callable[..., Any] = called
        else:
            assert callable(node.target)
            function = node.target
        start = time.perf_counter()
        value = function(*args, **kwargs)
        _wait(value)
        self.seconds["".join(self._path[-1:]), node.name].append(time.perf_counter() - start)
        return value

    def _inside(self, path: str, layer: GraphRunner, args: Any, kwargs: Any) -> Any:
        self._path.append(".".join((*self._path[-1:], path)))
        try:
            return layer(*args, **kwargs)
        finally:
            self._path.pop()


def _attribute(module: torch.nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _wait(value: Any) -> None:
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        torch.accelerator.synchronize(value.device)
