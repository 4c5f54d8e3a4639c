"""The index forms of a graph: what is known of a node, from what is known of its operands.

Values of inputs, parameters and persistent buffers are data and stay unknown (for other buffers see `index_tables`);
so does the result of every operator that is not in the tables of `index_elementwise`, `index_layout` and
`index_series`. What is left is what masks are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import fx

from ..memory import written_tensors
from . import index_elementwise, index_layout, index_series
from .index_bounds import SizeBounds
from .index_call import Call, is_tensor
from .index_elementwise import INTEGERS
from .index_forms import NARROW_LIMIT, Affine, Cases, Unknown, Value
from .index_tables import stored

HANDLERS = {**index_elementwise.HANDLERS, **index_layout.HANDLERS, **index_series.HANDLERS}


class IndexForms(Mapping[fx.Node, Value]):
    """What an element of each tensor of a graph is, by node, worked out when asked for.

    Nodes may be added to the graph, but none that writes into another's memory; none may be changed.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.bounds = SizeBounds.of(graph)
        self._graph = graph
        self._written = written_tensors(graph)
        self._values: dict[fx.Node, Value] = {}

    def __getitem__(self, node: fx.Node) -> Value:
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [o for o in current.all_input_nodes if o not in self._values and is_tensor(o)]
            if missing and current not in self._values and self._reads(current):
                pending.extend(missing)
                continue
            pending.pop()
            if current not in self._values:
                self._values[current] = self._evaluate(current)
        return self._values[node]

    def __iter__(self) -> Iterator[fx.Node]:
        return (node for node in self._graph.nodes if is_tensor(node))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def written(self, node: fx.Node) -> bool:
        """Whether some operator writes into the memory of a node's tensor."""
        return node in self._written

    def _reads(self, node: fx.Node) -> bool:
        """Whether what is known of a node comes from what is known of its operands."""
        return node not in self._written and _handler(node) is not None

    def _evaluate(self, node: fx.Node) -> Value:
        if node in self._written:
            return Unknown(f"{node.name} is written to in place")
        if node.op != "call_function":
            return stored(node)
        handler = _handler(node)
        if handler is None:
            return Unknown(f"the result of {node.target}")
        dtype = node.meta["val"].dtype
        if dtype is not torch.bool and dtype not in INTEGERS and not dtype.is_floating_point:
            return Unknown(f"elements of {dtype}")
        value = handler(Call.of(node, self._values, self.bounds))
        return _narrow(value) if dtype is torch.int32 else value


def _narrow(value: Value) -> Value:
    """An int32 value, unless its integers are so large that at lengths up to a million they might have wrapped."""
    leaves = [leaf for _, leaf in value.parts] if isinstance(value, Cases) else []
    forms = [leaf for leaf in leaves if isinstance(leaf, Affine)]
    if all(form.bounded(NARROW_LIMIT) == form for form in forms):
        return value
    return Unknown("large integers of 32 bits")


def _handler(node: fx.Node) -> Callable[[Call], Value] | None:
    target = node.target
    return HANDLERS.get(target.overloadpacket) if isinstance(target, torch._ops.OpOverload) else None
