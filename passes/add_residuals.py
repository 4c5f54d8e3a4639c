"""Residuals in a graph: a low-rank product and a diagonal for a projection (ResidualTransformer, eq. 2 and 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxreuse.errors import UnsupportedError
from fxreuse.finding.contractions import contraction
from fxreuse.finding.follow import packet
from fxreuse.layouts.projections import Projection, take_place
from fxreuse.nodes import call
from fxreuse.program import Program
from fxreuse.residual_linear import merged_weight, residual_linear
from fxreuse.tree import free_path
from fxreuse.weights.parts import contiguous, in_order

from .fit_residuals import Factors
from .parameters import add_index, add_parameter
from .weight_groups import Member

_aten = torch.ops.aten
_Insert = Callable[..., fx.Node]
#: Operators that are ``x W + b`` for an x with features last.
_LINEAR = frozenset({_aten.linear, _aten.addmm, _aten.matmul, _aten.mm})


@dataclasses.dataclass(frozen=True)
class Residual:
    """The residual of one matrix in a program: the nodes that read A (inputs × rank), B (rank × outputs) and D."""

    a: fx.Node
    b: fx.Node
    d: fx.Node | None

    @property
    def paths(self) -> dict[str, str]:
        """The paths of the parameters by the letters that the paper has for them."""
        named = {"A": self.a, "B": self.b, "D": self.d}
        return {letter: str(node.target) for letter, node in named.items() if node is not None}


def add_residual(program: Program, member: Member, factors: Sequence[Factors], lowering: str) -> list[Residual]:
    """Give a projection residuals of its own, one for each of its matrices, in place.

    ``factored`` adds ``(x A) B + x ∘ D`` to the projection's result, x cut or filled up with zeros to D's length;
    ``merged`` puts ``U + A B + D`` together at each call and projects with that, and nothing of it is kept. The two are
    equal, since a projection is linear in its weight. The sum takes over the name of the result's node.

    Arguments:
        program: a program that the caller owns.
        member: the projection and its matrices.
        factors: the values, for each of its matrices.
        lowering: ``factored`` or ``merged``.

    Raises:
        UnsupportedError: the projection moves the axes of its input about.
    """
    residuals = [_parameters(program, member, place, one) for place, one in enumerate(factors)]
    add = _add_product if lowering == "factored" else _merge
    add(program, member, residuals)
    return residuals


def _parameters(program: Program, member: Member, place: int, factors: Factors) -> Residual:
    """New parameters beside the layer's own weight: ``A``, ``B`` and ``D``, ``A_query`` … for one of several."""
    part = member.parts[place]
    above, _, name = member.weight.rpartition(".")
    whole = len(member.parts) == 1 and len(part.features) == _rows_of(member.projection)
    found: dict[str, fx.Node | None] = {}
    for letter, value in (("A", factors.a), ("B", factors.b), ("D", factors.d)):
        words = [name.removesuffix("weight").rstrip("_"), letter, "" if whole else part.role]
        path = free_path(program.module, above, "_".join(word for word in words if word))
        found[letter] = None if value is None else add_parameter(program, path, value, member.projection.weights[0])
    a, b = found["A"], found["B"]
    assert a is not None
    assert b is not None
    return Residual(a, b, found["D"])


def _rows_of(projection: Projection) -> int:
    """The output features that the parameter has."""
    return int(projection.weights[0].meta["val"].shape[projection.axis])


def _add_product(program: Program, member: Member, residuals: Sequence[Residual]) -> None:
    """``y + (x A) B + x ∘ D``."""
    projection, graph = member.projection, program.graph
    result = projection.result
    _check_axes(projection)

    def insert(target: Any, *args: Any) -> fx.Node:
        return call(graph, target, args, {}, like=result)

    if _is_linear(member):
        _take_all(program, member, residuals)
        return
    with graph.inserting_before(result.next):
        x = _to_last(insert, projection.source, projection.input_feature)
        added = [
            _product(insert, x, residual, member.shape(part))
            for part, residual in zip(member.parts, residuals, strict=True)
        ]
        whole = _joined(program, insert, member, added, -1)
        made = insert(_aten.add.Tensor, result, _from_last(insert, whole, projection.feature))
    readers = [user for user in result.users if user is not made]
    for reader in readers:
        reader.replace_input_with(result, made)
    result.name, made.name = made.name, result.name


def _is_linear(member: Member) -> bool:
    """Whether a projection is ``x W + b``, features last, whose matrices follow one another."""
    projection = member.projection
    ranks = {len(node.meta["val"].shape) for node in (projection.source, projection.result)}
    return (
        packet(projection.node) in _LINEAR
        and not projection.node.kwargs
        and len(ranks) == 1
        and ranks == {projection.feature + 1, projection.input_feature + 1}
        and in_order(member.parts)
    )


def _take_all(program: Program, member: Member, residuals: Sequence[Residual]) -> None:
    """One call of `residual_linear` for a projection and its residuals."""
    projection, graph = member.projection, program.graph
    result, weight = projection.result, projection.weights[-1]
    bias = projection.biases[-1] if projection.biases else None
    with graph.inserting_before(result.next):
        if _axis_of_outputs(projection) == 1:
            weight = call(graph, _aten.t.default, (weight,), {}, like=result)
        factors = [(residual.a, residual.b, residual.d) for residual in residuals]
        made = call(graph, residual_linear, (projection.source, weight, bias, factors), {}, like=result)
    take_place(made, result)
    if not projection.node.users and projection.node is not result:
        graph.erase_node(projection.node)


def _axis_of_outputs(projection: Projection) -> int:
    """The axis of output features of the weight as the product reads it."""
    return 1 - projection.axis if projection.turned else projection.axis


def _product(insert: _Insert, x: fx.Node, residual: Residual, shape: tuple[int, int]) -> fx.Node:
    """``(x A) B + x ∘ D`` for one matrix, features last."""
    made = insert(_aten.matmul.default, insert(_aten.matmul.default, x, residual.a), residual.b)
    if residual.d is None:
        return made
    inputs, outputs = shape
    size = min(inputs, outputs)
    cut = x if size == inputs else insert(_aten.slice.Tensor, x, -1, 0, size)
    # Autocast computes products in another type than the parameters': what is added takes that.
    scaled = insert(_aten.type_as.default, insert(_aten.mul.Tensor, cut, residual.d), made)
    if size == outputs:
        return insert(_aten.add.Tensor, made, scaled)
    first = insert(_aten.add.Tensor, insert(_aten.slice.Tensor, made, -1, 0, size), scaled)
    return insert(_aten.cat.default, [first, insert(_aten.slice.Tensor, made, -1, size, outputs)], -1)


def _merge(program: Program, member: Member, residuals: Sequence[Residual]) -> None:
    """``x (U + A B + D)``, in place of the weight as the product reads it."""
    projection, graph = member.projection, program.graph
    weight, reader = projection.weights[-1], projection.node
    outputs = _axis_of_outputs(projection)
    kernel = list(weight.meta["val"].shape)[2:]

    def insert(target: Any, *args: Any) -> fx.Node:
        return call(graph, target, args, {}, like=reader)

    with graph.inserting_before(reader):
        whole = insert(_aten.flatten.using_ints, weight, 1) if kernel else weight
        merged = []
        for part, residual in zip(member.parts, residuals, strict=True):
            several = len(member.parts) > 1
            own = _features(program, insert, member, whole, outputs, part.features) if several else whole
            if outputs == 0:
                left, right = (insert(_aten.t.default, node) for node in (residual.b, residual.a))
            else:
                left, right = residual.a, residual.b
            merged.append(insert(merged_weight, own, left, right, residual.d))
        made = _joined(program, insert, member, merged, outputs)
        made = insert(_aten.reshape.default, made, [*made.meta["val"].shape, *kernel]) if kernel else made
        reader.replace_input_with(weight, made)


def _features(
    program: Program, insert: _Insert, member: Member, node: fx.Node, dim: int, features: torch.Tensor
) -> fx.Node:
    """Some features of a value along a dimension."""
    span = contiguous(features)
    if span is not None:
        return insert(_aten.slice.Tensor, node, dim, *span)
    return insert(_aten.index_select.default, node, dim, _index(program, member, features, node))


def _joined(program: Program, insert: _Insert, member: Member, pieces: Sequence[fx.Node], dim: int) -> fx.Node:
    """What was made for each matrix, in the order of the projection's features."""
    if len(pieces) == 1:
        return pieces[0]
    whole = insert(_aten.cat.default, list(pieces), dim)
    if in_order(member.parts):
        return whole
    order = torch.argsort(torch.cat([part.features for part in member.parts]))
    return insert(_aten.index_select.default, whole, dim, _index(program, member, order, whole))


def _index(program: Program, member: Member, features: torch.Tensor, like: fx.Node) -> fx.Node:
    path = free_path(program.module, member.weight.rpartition(".")[0], "features")
    return add_index(program, path, features, like)


def _check_axes(projection: Projection) -> None:
    """The axes of tokens stand in the result as they do in the input."""
    product = contraction(projection.node)
    if product is None:
        return
    labels, source, others = product.side(projection.weights[-1])
    before = [label for label in others if label not in labels]
    after = [label for label in product.axes if label not in labels]
    if before != after:
        raise UnsupportedError(
            f"{projection.node.name}, the product with {projection.weight}, moves the axes of {source.name} about; "
            "lowering=merged does not mind."
        )


def _to_last(insert: _Insert, node: fx.Node, dim: int) -> fx.Node:
    last = dim == node.meta["val"].dim() - 1
    return node if last else insert(_aten.movedim.int, node, dim, -1)


def _from_last(insert: _Insert, node: fx.Node, dim: int) -> fx.Node:
    last = dim == node.meta["val"].dim() - 1
    return node if last else insert(_aten.movedim.int, node, -1, dim)
