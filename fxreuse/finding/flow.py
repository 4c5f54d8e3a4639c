"""What every value of a graph depends on: inputs, parameters, tokens; and whether two values have one source."""

from __future__ import annotations

import torch
from torch import fx

from ..program import Program, get_attribute
from .contractions import contraction
from .follow import VIEWS, aten, packet

#: Fused attentions, as operators.
FUSED = frozenset(
    getattr(aten, name)
    for name in ("scaled_dot_product_attention", *(n for n in dir(aten) if n.startswith("_scaled_dot_product")))
    if "backward" not in name
)

#: Operators that read no more of their first argument than its sizes and type.
SHAPE_ONLY = frozenset({
    aten.new_ones, aten.new_zeros, aten.new_full, aten.new_empty, aten.ones_like, aten.zeros_like, aten.full_like,
    aten.empty_like,
})  # fmt: skip


class Flow:
    """The dependences of a program's values, each computed once in a pass over the graph.

    ``inputs`` are the nodes whose values depend on the values (not only the sizes) of an input, ``parameters`` those
    that depend on a parameter, ``tokens`` those that carry tokens: floating point, and made from a floating-point
    input or from an input and a parameter. ``projected`` have a product with a parameter behind them.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.inputs: set[fx.Node] = set()
        self.parameters: set[fx.Node] = set()
        self.tokens: set[fx.Node] = set()
        self.projected: set[fx.Node] = set()
        self.order: dict[fx.Node, int] = {}
        self._above: dict[fx.Node, fx.Node | None] = {}
        self._depth: dict[fx.Node, int] = {}
        for index, node in enumerate(program.graph.nodes):
            self.order[node] = index
            self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        if not _has_tensor(node):
            return
        read = value_operands(node)
        if node.op == "placeholder" or any(o in self.inputs for o in read):
            self.inputs.add(node)
        if self._reads_parameter(node) or any(o in self.parameters for o in read):
            self.parameters.add(node)
        if (node in self.parameters and self.is_product(node)) or any(o in self.projected for o in read):
            self.projected.add(node)
        if self._carries_tokens(node, read):
            self.tokens.add(node)
            self._place(node, [o for o in read if o in self.tokens])
        self._write(node)

    def _write(self, node: fx.Node) -> None:
        """What an in-place operator makes is from then on also what the tensor holds that it writes into."""
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable or not node.args or not isinstance(node.args[0], fx.Node):
            return
        written = node.args[0]
        while (packet(written) in VIEWS) and isinstance(written.args[0], fx.Node):
            written = written.args[0]
        for group in (self.inputs, self.parameters, self.projected):
            if node in group:
                group.add(written)
        if node not in self.tokens:
            return
        if written not in self.tokens:
            self.tokens.add(written)
            self._place(written, [node])
        elif self._meet(node, written) is not written:
            self._place(written, [node, written])

    def _reads_parameter(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return isinstance(get_attribute(self.program.module, str(node.target)), torch.nn.Parameter)
        if node.op == "call_module":
            return any(True for _ in self.program.module.get_submodule(str(node.target)).parameters())
        return False

    def _carries_tokens(self, node: fx.Node, read: list[fx.Node]) -> bool:
        if node not in self.inputs or not _is_floating(node):
            return False
        return node.op == "placeholder" or node in self.parameters or any(o in self.tokens for o in read)

    def _place(self, node: fx.Node, above: list[fx.Node]) -> None:
        """Hang the node below the nearest one that everything it has of tokens goes through (its dominator)."""
        nearest: fx.Node | None = above[0] if above else None
        for other in above[1:]:
            nearest = self._meet(nearest, other)
        self._above[node] = nearest
        self._depth[node] = 0 if nearest is None else self._depth[nearest] + 1

    def _meet(self, one: fx.Node | None, other: fx.Node | None) -> fx.Node | None:
        while one is not other:
            if one is None or other is None:
                return None
            if self._depth[one] >= self._depth[other]:
                one = self._above[one]
            else:
                other = self._above[other]
        return one

    def is_product(self, node: fx.Node) -> bool:
        """Whether a node is a contraction."""
        return contraction(node) is not None

    def mixes_tokens(self, node: fx.Node) -> bool:
        """Whether a node brings tokens together with tokens: a product of two such values, or a fused attention."""
        if packet(node) in FUSED:
            return True
        product = contraction(node)
        return product is not None and product.left in self.tokens and product.right in self.tokens

    def same_source(self, query: fx.Node, key: fx.Node) -> bool:
        """Whether queries and keys descend from one tensor of tokens, with no attention in between.

        Values that depend on no input have one source if they are made from one common value.
        """
        if query in self.tokens and key in self.tokens:
            source = self._meet(query, key)
            return source is not None and not any(self._mixed_since(source, node) for node in (query, key))
        if query in self.tokens or key in self.tokens:
            return False
        shared = self._behind(query) & self._behind(key)
        return any(node in self.parameters and node.op != "get_attr" for node in shared)

    def _mixed_since(self, source: fx.Node, node: fx.Node) -> bool:
        """Whether attention lies between a value and what it descends from."""
        seen = {source}
        pending = [node]
        while pending:
            current = pending.pop()
            if current in seen:
                continue
            seen.add(current)
            if self.mixes_tokens(current):
                return True
            pending.extend(o for o in value_operands(current) if o in self.tokens)
        return False

    def _behind(self, node: fx.Node) -> set[fx.Node]:
        seen: set[fx.Node] = set()
        pending = [node]
        while pending:
            current = pending.pop()
            if current not in seen:
                seen.add(current)
                pending.extend(value_operands(current))
        return seen


def value_operands(node: fx.Node) -> list[fx.Node]:
    """The operands whose values (not only sizes or types) a node's value depends on, each a tensor or several."""
    if packet(node) in SHAPE_ONLY:
        return []
    operands = node.all_input_nodes
    if packet(node) is aten.type_as:
        operands = operands[:1]
    return [o for o in operands if _has_tensor(o)]


def _has_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return any(isinstance(v, torch.Tensor) for v in value)
    return isinstance(value, torch.Tensor)


def _is_floating(node: fx.Node) -> bool:
    value = node.meta["val"]
    first = value[0] if isinstance(value, (tuple, list)) else value
    return isinstance(first, torch.Tensor) and (first.is_floating_point() or first.is_complex())
