"""What shared weights and residuals mean, said a second time: the original module, with the weights that they make.

The original may itself be a rewritten model. Then a layer that reads another layer's weight, which it is passed as an
argument, is passed one of its own in place of it; and what both models are made of in the same way is taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..emission.rewritten import Layer
from ..record import Record, SharedMatrix

_Values = dict[str, torch.Tensor]


class _Place(NamedTuple):
    """Where a matrix lies in the original: the paths of its weight and bias, and the rows there."""

    weight: str
    bias: str | None
    rows: Sequence[int]


def has_weights_for(original: torch.nn.Module, record: Record) -> bool:
    """Whether every layer's own weight in the original can be given the value that the layer works with.

    It cannot where modules of the original are called by several layers, where a pass changed the size of a matrix, or
    where a rewritten original is made in another way and has no layer that could be passed a weight of its own.
    """
    layers: dict[str, set[int]] = {}
    for one in record.matrices:
        layers.setdefault(one.weight, set()).add(one.layer)
    sized = all(len(one.rows) == len(one.shared_rows) == one.shape[1] for one in record.matrices)
    if not sized or any(len(found) > 1 for found in layers.values()):
        return False
    earlier = _earlier(original)
    for one in record.matrices:
        before = earlier.get((one.weight, one.role))
        if before is None:
            found = _has(original, one.weight) and (one.bias is None or _has(original, one.bias))
        else:
            found = _made_alike(before, one) or (not before.residual and _layer_of(original, one) is not None)
        if not found:
            return False
    return True


def put_weights(original: torch.nn.Module, rewritten: torch.nn.Module, record: Record) -> None:
    """Give the original U + A B + D as its weights, and shared biases as its biases, from the rewritten model's values.

    Its own parameters are replaced, and none is written to: the two models may share them.

    Arguments:
        original: a copy of the original, in place.
        rewritten: what the record is of.
        record: the record of a rewrite, for which `has_weights_for` holds.
    """
    earlier = _earlier(original)
    own: _Values = {}
    passed: dict[str, _Values] = {}
    for one in record.matrices:
        before = earlier.get((one.weight, one.role))
        if before is None:
            _put(own, original, rewritten, one, _Place(one.weight, one.bias, one.rows))
        elif _made_alike(before, one):
            paths = [one.shared, *one.residual.values(), *([one.shared_bias] if one.shared_bias else [])]
            own |= {path: rewritten.get_parameter(path).detach().clone() for path in paths}
        else:
            layer = _layer_of(original, one)
            assert layer is not None
            place = _Place(before.shared, before.shared_bias, before.shared_rows)
            _put(passed.setdefault(layer, {}), original, rewritten, one, place)
    for layer, values in passed.items():
        own |= {path: value for path, value in values.items() if path.startswith(f"{layer}.")}
    for path, value in own.items():
        owner, _, name = path.rpartition(".")
        original.get_submodule(owner)._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
    for layer, values in passed.items():
        given = {id(original.get_parameter(path)): value for path, value in values.items()}
        original.get_submodule(layer).register_forward_pre_hook(_in_place_of(given))


def dense(rewritten: torch.nn.Module, one: SharedMatrix) -> torch.Tensor:
    """The matrix that a layer works with, inputs × outputs: U + A B + D (ResidualTransformer, eq. 2 and 3)."""
    shared = _as_matrix(rewritten.get_parameter(one.shared).detach()).movedim(one.axis, 0)[list(one.shared_rows)]
    matrix = shared.t().clone()
    parts = {letter: rewritten.get_parameter(path).detach() for letter, path in one.residual.items()}
    if parts:
        matrix += parts["A"] @ parts["B"]
    if "D" in parts:
        matrix.diagonal().add_(parts["D"])
    return matrix


def _earlier(original: torch.nn.Module) -> dict[tuple[str, str], SharedMatrix]:
    """What an earlier rewrite did with each matrix, by weight and role, where the original is a rewritten model."""
    record = getattr(original, "record", None)
    return {(one.weight, one.role): one for one in record.matrices} if isinstance(record, Record) else {}


def _made_alike(before: SharedMatrix, one: SharedMatrix) -> bool:
    """Whether the matrix is made of the same parameters in both models, as after pruning."""
    return (before.shared, before.shared_bias, before.residual) == (one.shared, one.shared_bias, one.residual)


def _layer_of(original: torch.nn.Module, one: SharedMatrix) -> str | None:
    """The path of the layer that the matrix is of, where it is a module that is passed what it shares."""
    path = one.weight
    while path:
        path = path.rpartition(".")[0]
        if path and _has_module(original, path) and isinstance(original.get_submodule(path), Layer):
            return path
    return None


def _has_module(original: torch.nn.Module, path: str) -> bool:
    try:
        original.get_submodule(path)
    except AttributeError:
        return False
    return True


def _has(original: torch.nn.Module, path: str) -> bool:
    try:
        original.get_parameter(path)
    except AttributeError:
        return False
    return True


def _in_place_of(given: Mapping[int, torch.Tensor]) -> Callable[[torch.nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A hook that passes a module other tensors, by the identity of those that it would be passed."""
    return lambda _, args: tuple(given.get(id(argument), argument) for argument in args)


def _put(
    made: _Values, original: torch.nn.Module, rewritten: torch.nn.Module, one: SharedMatrix, place: _Place
) -> None:
    """Put a matrix and its bias, as the rewritten model has them, into their rows of the original's parameters."""
    weight = _own(made, original, place.weight)
    _as_matrix(weight).movedim(one.axis, 0)[list(place.rows)] = dense(rewritten, one).t().to(weight.dtype)
    if place.bias is not None and one.shared_bias is not None:
        bias = _own(made, original, place.bias)
        bias[list(place.rows)] = rewritten.get_parameter(one.shared_bias).detach()[list(one.shared_rows)]


def _as_matrix(parameter: torch.Tensor) -> torch.Tensor:
    """A view without the axes of a kernel, which has one position, where the parameter is that of a convolution."""
    return parameter.view(parameter.shape[:2])


def _own(made: _Values, original: torch.nn.Module, path: str) -> torch.Tensor:
    """The new value of a parameter as far as it is made; at first what it was."""
    if path not in made:
        made[path] = original.get_parameter(path).detach().clone()
    return made[path]
