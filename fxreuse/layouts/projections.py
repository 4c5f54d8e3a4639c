"""Products with a weight, and the views between them and an attention, run on indices instead of numbers."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from ..errors import UnsupportedError
from ..finding.contractions import Contraction, contraction, is_convolution
from ..finding.follow import SAME_VALUE, arguments, aten, is_same_value, packet
from ..masks.index_tables import constant_tensor
from ..nodes import evaluate, inserting_before, replace
from ..program import Program, fixed_size, get_attribute

#: Operators that only say where the elements of their first argument go; several of them make copies.
MOVES = frozenset({
    aten.view, aten.reshape, aten._unsafe_view, aten._reshape_copy, aten.view_as, aten.reshape_as, aten.flatten,
    aten.unflatten, aten.ravel, aten.squeeze, aten.unsqueeze, aten.transpose, aten.swapaxes, aten.swapdims,
    aten.permute, aten.movedim, aten.moveaxis, aten.t, aten.mT, aten.numpy_T, aten.contiguous, aten.clone, aten.select,
    aten.slice, aten.narrow, aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split, aten.unbind,
    aten.expand, aten.expand_as, aten.broadcast_to, aten.repeat, aten.tile, aten.repeat_interleave, aten.flip,
    aten.roll, operator.getitem,
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Projection:
    """A product of a value with a Parameter.

    ``node`` is the product and ``result`` the value after its bias (two nodes where the bias is added on its own);
    ``source`` is the value that is projected. ``weights`` and ``biases`` are the nodes from the one that reads the
    parameter to the view of it that the product reads; there is no bias where ``biases`` is empty. ``axis`` is the
    weight's axis of output features and ``inputs`` that of input features; ``rows`` and ``columns`` say for every
    feature of the product its index there, and the view is ``turned`` where its axes are the other way round.
    ``feature`` is the dimension of output features in ``result``, ``input_feature`` that of input features in
    ``source``.
    """

    node: fx.Node
    result: fx.Node
    source: fx.Node
    weights: tuple[fx.Node, ...]
    biases: tuple[fx.Node, ...]
    axis: int
    inputs: int
    turned: bool
    rows: torch.Tensor
    columns: torch.Tensor
    feature: int
    input_feature: int

    @property
    def weight(self) -> str:
        """The path of the weight."""
        return str(self.weights[0].target)

    @property
    def bias(self) -> str | None:
        """The path of the bias."""
        return str(self.biases[0].target) if self.biases else None

    def read_here_only(self) -> bool:
        """Whether nothing else in the graph reads the weight and the bias."""
        return all(len(value_readers(node)) == 1 for node in (*self.weights, *self.biases))


def read_projection(program: Program, node: fx.Node) -> Projection | None:
    """The projection whose product or whose separately added bias a node is; None where it is neither."""
    if node.op != "call_function":
        return None
    if packet(node) is aten.add and not node.kwargs and len(node.args) == 2:
        return _with_added_bias(program, node)
    if is_convolution(node):
        return _convolution(program, node)
    product = contraction(node)
    return None if product is None else _product(program, product)


#: Operators that take type and device, but neither values nor sizes, from their first argument.
_TYPE_ONLY = frozenset({aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty})


def value_readers(node: fx.Node) -> list[fx.Node]:
    """The users of a node but for those that only take its type and device."""
    return [
        user
        for user in node.users
        if not (packet(user) in SAME_VALUE and user.args[0] is not node) and packet(user) not in _TYPE_ONLY
    ]


def is_parameter(program: Program, node: Any) -> bool:
    """Whether a node reads a parameter as it is."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return False
    return isinstance(get_attribute(program.module, str(node.target)), torch.nn.Parameter)


def _product(program: Program, product: Contraction) -> Projection | None:
    for operand in (product.right, product.left):
        labels, source, source_labels = product.side(operand)
        summed = [label for label in labels if label in product.summed]
        kept = [label for label in labels if label in product.axes and label not in source_labels]
        if len(labels) != 2 or len(summed) != 1 or len(kept) != 1:
            continue
        weights = _views_of_parameter(program, operand)
        found = None if weights is None else _features(weights, labels.index(kept[0]))
        if weights is None or found is None:
            continue
        axis, rows, columns = found
        biases = () if product.addend is None else _read_bias(program, product.addend, rows)
        if biases is None:
            return None
        turned = axis != labels.index(kept[0])
        places = product.axes.index(kept[0]), source_labels.index(summed[0])
        node = product.node
        return Projection(node, node, source, weights, biases, axis, 1 - axis, turned, rows, columns, *places)
    return None


def _convolution(program: Program, node: fx.Node) -> Projection | None:
    named = arguments(node)
    weight, bias, source = named["weight"], named["bias"], named["input"]
    if not is_parameter(program, weight) or named["groups"] != 1 or named.get("transposed", False):
        return None
    if bias is not None and not is_parameter(program, bias):
        return None
    shape = weight.meta["val"].shape
    if source.meta["val"].dim() != len(shape):
        return None
    rows, columns = torch.arange(int(shape[0])), torch.arange(int(shape[1]))
    biases = () if bias is None else (bias,)
    return Projection(node, node, source, (weight,), biases, 0, 1, False, rows, columns, 1, 1)


def _with_added_bias(program: Program, node: fx.Node) -> Projection | None:
    """``x @ weight + bias``, written as two operators."""
    for product, added in (node.args, node.args[::-1]):
        if not isinstance(product, fx.Node) or not isinstance(added, fx.Node) or len(product.users) != 1:
            continue
        if not is_parameter(program, added) or contraction(product) is None:
            continue
        found = read_projection(program, product)
        if found is None or found.biases or found.feature != product.meta["val"].dim() - 1:
            continue
        biases = _read_bias(program, added, found.rows)
        if biases is not None:
            return dataclasses.replace(found, result=node, biases=biases)
    return None


def _features(weights: tuple[fx.Node, ...], feature: int) -> tuple[int, torch.Tensor, torch.Tensor] | None:
    """The parameter's axis of output features, and for both features of the product the indices in the parameter.

    The weight may be a transposed or cut view, in which dimension ``feature`` has the output features.
    """
    shape = tuple(int(s) for s in weights[0].meta["val"].shape)
    if len(shape) != 2:
        return None
    if len(weights) == 1:
        return feature, torch.arange(shape[feature]), torch.arange(shape[1 - feature])
    places = [torch.arange(size).reshape(-1, *[1] * (1 - dim)).expand(shape) for dim, size in enumerate(shape)]
    for node in weights[1:]:
        places = [run(node, place) for place in places]
    for axis, (own, other) in enumerate((places, places[::-1])):
        rows, columns = own.select(1 - feature, 0), other.select(feature, 0)
        if bool((own == rows.unsqueeze(1 - feature)).all() and (other == columns.unsqueeze(feature)).all()):
            return axis, rows, columns
    return None


def _read_bias(program: Program, node: fx.Node, rows: torch.Tensor) -> tuple[fx.Node, ...] | None:
    """The nodes from a bias to what is added, if the product's feature ``i`` gets the element ``rows[i]`` of it."""
    chain = _views_of_parameter(program, node)
    if chain is None or node.meta["val"].dim() != 1:
        return None
    place: Any = torch.arange(chain[0].meta["val"].numel()).reshape(chain[0].meta["val"].shape)
    for view in chain[1:]:
        place = run(view, place)
    return chain if torch.equal(place, rows) else None


def _views_of_parameter(program: Program, node: fx.Node) -> tuple[fx.Node, ...] | None:
    """The nodes from the one that reads a parameter to a view of it."""
    chain = [node]
    while not is_parameter(program, chain[-1]):
        last = chain[-1]
        if last.op != "call_function" or not (is_move(last) or packet(last) in SAME_VALUE):
            return None
        if not isinstance(last.args[0], fx.Node):
            return None
        chain.append(last.args[0])
    return tuple(reversed(chain))


def resize(program: Program, projection: Projection, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, int]:
    """Give a projection a weight and a bias of other sizes, in place; what it read were all their readers.

    The product reads the new parameters as they are, no views of them. What reads its result is left to the caller.

    Returns how many elements each parameter gained, by path.
    """
    gained = {}
    for nodes, tensor in ((projection.weights, weight), (projection.biases, bias)):
        if not nodes or tensor is None:
            continue
        gained[str(nodes[0].target)] = tensor.numel() - nodes[0].meta["val"].numel()
        set_parameter(program, nodes[0], tensor)
        _read_whole(projection, nodes)
    for node in dict.fromkeys((projection.node, projection.result)):
        refresh(node)
    return gained


def set_parameter(program: Program, node: fx.Node, tensor: torch.Tensor) -> None:
    """Put a parameter with other values in the place of the one that a node reads."""
    owner, _, name = str(node.target).rpartition(".")
    old = get_attribute(program.module, str(node.target))
    program.module.get_submodule(owner)._parameters[name] = torch.nn.Parameter(tensor, old.requires_grad)
    with node.meta["val"].fake_mode:
        fake = torch.empty(tensor.shape, dtype=old.dtype, device=old.device)
        node.meta["val"] = torch.nn.Parameter(fake, old.requires_grad)


def _read_whole(projection: Projection, nodes: tuple[fx.Node, ...]) -> None:
    reader = projection.node if nodes[-1] in projection.node.all_input_nodes else projection.result
    if len(nodes) == 1:
        return
    read = nodes[0]
    if nodes is projection.weights and projection.turned:
        with inserting_before(reader) as insert:
            read = insert(aten.t.default, read)
    reader.replace_input_with(nodes[-1], read)


def refresh(node: fx.Node) -> None:
    """Compute a node's value anew, after what it reads has changed its size."""
    assert callable(node.target)
    node.meta["val"] = evaluate(node.target, node.args, dict(node.kwargs))


def take_place(new: fx.Node, node: fx.Node) -> None:
    """Every reader of ``node`` reads ``new``, which takes over its name: who knew ``node`` by name finds ``new``."""
    name = node.name
    replace(node, new)
    new.name = name


def is_move(node: fx.Node) -> bool:
    """Whether a node only moves, copies or leaves out elements of its first argument; by constant places, too."""
    return node.op == "call_function" and (packet(node) in MOVES or _is_indexed_by_constants(node))


def _is_indexed_by_constants(node: fx.Node) -> bool:
    """``x[..., [-1], :]``: which elements it takes stands in the program, and in nothing that a checkpoint replaces."""
    if packet(node) is not aten.index:
        return False
    indices = [index for index in node.args[1] if index is not None]  # type: ignore[union-attr]
    return all(_constant(index) is not None for index in indices)


def _constant(node: Any) -> torch.Tensor | None:
    """The numbers of a constant tensor of the program."""
    while isinstance(node, fx.Node) and packet(node) in (aten.lift_fresh_copy, aten.detach, aten.clone, aten.alias):
        node = node.args[0]
    return constant_tensor(node) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def is_unary(node: fx.Node, program: Program) -> bool:
    """Whether every element of a node is made from the same element of its first argument and from numbers alone.

    Casts, dropout, and factors that are numbers.
    """
    if is_same_value(node, program):
        return True
    if node.op != "call_function" or packet(node) not in (aten.mul, aten.div, aten.neg):
        return False
    return len([o for o in node.all_input_nodes if isinstance(o.meta.get("val"), torch.Tensor)]) == 1


def run(node: fx.Node, value: Any) -> Any:
    """A move or a copy of a plain tensor; symbolic sizes are those of the example."""
    if not is_move(node) or packet(node) in (aten.clone, aten.contiguous):
        return value

    def plain(argument: fx.Node) -> Any:
        found = argument.meta["val"]
        if packet(node) is aten.index:
            return _constant(argument)
        return torch.empty(hints(found), device="meta") if isinstance(found, torch.Tensor) else hint(found)

    args, kwargs = fx.node.map_arg((node.args[1:], node.kwargs), plain)
    return node.target(value, *args, **kwargs)  # type: ignore[operator]


def hint(size: Any) -> int:
    """A size as it is with the example inputs.

    Raises:
        UnsupportedError: where it is made from the values of a tensor, so that it is known at a call only.
    """
    number = fixed_size(size)
    if number is None and size.node.hint is None:
        raise UnsupportedError(f"The size {size} is made from values, and so not known before the model runs.")
    return int(size.node.hint) if number is None else number


def hints(value: torch.Tensor) -> tuple[int, ...]:
    """The shape of a tensor with the example inputs."""
    return tuple(hint(size) for size in value.shape)
