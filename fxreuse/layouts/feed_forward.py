"""Feed-forward layers, found by data flow: d→f projections, elementwise operators, and a projection f→d."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator

import torch
from torch import fx

from ..errors import UnsupportedError
from ..finding.contractions import is_convolution
from ..finding.follow import aten, is_elementwise, is_same_value, packet
from ..program import Program, fixed_size, module_stack
from .projections import Projection, read_projection

_SPLITS = frozenset({aten.chunk, aten.split, aten.split_with_sizes})
_RESHAPES = frozenset({aten.view, aten.reshape, aten._unsafe_view})


@dataclasses.dataclass(frozen=True)
class Up:
    """A projection to the inner width of a feed-forward layer; of ``parts`` times that width where it is split."""

    projection: Projection
    parts: int


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """A feed-forward layer: what projects to its width, what projects back, and the nodes between, in order."""

    layer: str
    width: int
    ups: tuple[Up, ...]
    between: tuple[fx.Node, ...]
    down: Projection

    @property
    def weights(self) -> frozenset[str]:
        """The paths of its weights: layers that share them are one and the same."""
        return frozenset({self.down.weight, *(up.projection.weight for up in self.ups)})

    @property
    def size_of_unit(self) -> int:
        """The number of parameters by which one unit of width more makes it larger."""
        rows = sum(up.parts * (len(up.projection.columns) + bool(up.projection.biases)) for up in self.ups)
        return rows + len(self.down.rows)


def find_feed_forward(program: Program, layers: Iterable[str]) -> list[FeedForward]:
    """The feed-forward layers of some layers, in the order of execution.

    A feed-forward layer is a projection whose input is computed elementwise from one or more projections of that width
    and from nothing else of it, the model's width at both ends: plain, gated (the product of two projections, or of the
    halves of one), with dropout. Where a layer has several of different widths, the widest are meant, and not a
    bottleneck or an adapter; a Conformer's two are as wide. Convolutions are none, also where their kernel has one tap.

    Arguments:
        program: a program.
        layers: the module calls that are the layers, as `AttentionSite.layer_path`.

    Raises:
        UnsupportedError: where a layer has none.
    """
    wanted = dict.fromkeys(layers)
    found: dict[str, list[FeedForward]] = {layer: [] for layer in wanted}
    for node in program.graph.nodes:
        layer = next((path for path in module_stack(node) if path in wanted), None)
        if layer is None or layer == "":
            continue
        candidate = _feed_forward(program, node, layer)
        if candidate is not None:
            found[layer].append(candidate)
    for layer, candidates in found.items():
        if not candidates:
            raise UnsupportedError(
                f"no feed-forward layer was found in {layer or repr(program.name)}: it takes "
                "a projection to a larger width, elementwise operators alone, and a projection back. Leave ffn= out."
            )
    widest = {layer: max(one.width for one in candidates) for layer, candidates in found.items()}
    return [one for candidates in found.values() for one in candidates if one.width == widest[one.layer]]


def _feed_forward(program: Program, node: fx.Node, layer: str) -> FeedForward | None:
    down = _linear(program, node)
    if down is None or down.result is not node or down.input_feature != down.source.meta["val"].dim() - 1:
        return None
    walk = _Walk(program, len(down.columns), down)
    if not walk.visit(down.source) or not walk.closed():
        return None
    if any(len(up.projection.columns) != len(down.rows) for up in walk.ups.values()):
        return None
    order = [other for other in node.graph.nodes if other in walk.between]
    return FeedForward(layer, walk.width, tuple(walk.ups.values()), tuple(order), down)


def _linear(program: Program, node: fx.Node) -> Projection | None:
    """A projection of whole parameters, features last, that is no convolution and no part of a separate bias."""
    found = read_projection(program, node)
    if found is None or is_convolution(found.node) or found.feature != found.result.meta["val"].dim() - 1:
        return None
    if found.result is found.node and _has_bias_added(program, node):
        return None
    whole = found.weights[0].meta["val"].shape
    in_order = torch.equal(found.rows, torch.arange(whole[found.axis])) and torch.equal(
        found.columns, torch.arange(whole[found.inputs])
    )
    return found if in_order else None


def _has_bias_added(program: Program, node: fx.Node) -> bool:
    """Whether the bias of a product is added by the operator that reads it."""
    for user in node.users:
        outer = read_projection(program, user)
        if outer is not None and outer.node is node:
            return True
    return False


class _Walk:
    """Backwards from the input of the second projection, over elementwise operators, to the first ones."""

    def __init__(self, program: Program, width: int, down: Projection) -> None:
        self.program, self.width, self.down = program, width, down
        self.between: dict[fx.Node, None] = {}
        self.ups: dict[fx.Node, Up] = {}

    def visit(self, node: fx.Node) -> bool:
        """Whether a value of that width comes from projections and elementwise operators alone."""
        if node in self.between or node in self.ups:
            return True
        if self._is_up(node, 1):
            return True
        operands = self._operands(node)
        if operands is None:
            return False
        self.between[node] = None
        return all(self.visit(operand) for operand in operands)

    def closed(self) -> bool:
        """Whether nobody else reads what has that width."""
        inside = {*self.between, self.down.node}
        return all(inside.issuperset(node.users) for node in (*self.between, *self.ups))

    def _is_up(self, node: fx.Node, parts: int) -> bool:
        found = _linear(self.program, node)
        if found is None or found.result is not node or len(found.rows) != parts * self.width:
            return False
        self.ups[node] = Up(found, parts)
        return True

    def _operands(self, node: fx.Node) -> list[fx.Node] | None:
        """The operands of a node that have the width, if it keeps every channel to itself; None if it does not."""
        if packet(node) is operator.getitem:
            return self._part(node)
        if packet(node) is aten.glu:
            return self._halves(node)
        if packet(node) in _RESHAPES:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            return [source] if _last(source) == _last(node) == self.width else None
        if node.op == "call_module" and not is_same_value(node, self.program):
            return None
        if not (is_elementwise(node) or is_same_value(node, self.program)):
            return None
        tensors = [o for o in node.all_input_nodes if isinstance(o.meta.get("val"), torch.Tensor)]
        wide = [o for o in tensors if _last(o) == self.width]
        return wide if wide and all(_last(o) in (1, self.width) for o in tensors) else None

    def _halves(self, node: fx.Node) -> list[fx.Node] | None:
        """A gated linear unit over the channels of one projection."""
        (source,), dim = node.all_input_nodes, node.args[1] if len(node.args) > 1 else -1
        last = dim in (-1, source.meta["val"].dim() - 1)
        return [] if last and self._is_up(source, 2) else None

    def _part(self, node: fx.Node) -> list[fx.Node] | None:
        """One of the equal parts that the channels of one projection are split into."""
        split = node.args[0]
        if not isinstance(split, fx.Node) or packet(split) not in _SPLITS:
            return None
        source, parts = split.args[0], split.meta["val"]
        dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
        assert isinstance(source, fx.Node)
        if dim not in (-1, source.meta["val"].dim() - 1) or any(part.shape[-1] != self.width for part in parts):
            return None
        self.between[split] = None
        return [] if source in self.ups or self._is_up(source, len(parts)) else None


def _last(node: fx.Node) -> int | None:
    """The size of the last axis; 1 for a tensor of no axes, None where it is free."""
    shape = node.meta["val"].shape
    return fixed_size(shape[-1]) if len(shape) else 1


def readers(program: Program, path: str) -> Iterator[fx.Node]:
    """The nodes that read a parameter."""
    for node in program.graph.find_nodes(op="get_attr"):
        if node.target == path:
            yield from node.users
