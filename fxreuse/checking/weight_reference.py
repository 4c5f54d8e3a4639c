"""What shared weights and residuals mean, said a second time: the original module, with the weights that they make."""

from __future__ import annotations

import torch

from ..record import Record, SharedMatrix


def has_weights_for(record: Record) -> bool:
    """Whether every layer's own weight in the original can be given the value that the layer works with.

    It cannot where layers of the original share weights already, or where a pass changed the size of a matrix.
    """
    layers: dict[str, set[int]] = {}
    for one in record.matrices:
        layers.setdefault(one.weight, set()).add(one.layer)
    sized = all(len(one.rows) == one.shape[1] for one in record.matrices)
    return sized and all(len(found) == 1 for found in layers.values())


def put_weights(original: torch.nn.Module, rewritten: torch.nn.Module, record: Record) -> None:
    """Give the original U + A B + D as its weights, and shared biases as its biases, from the rewritten model's values.

    Its own parameters are replaced, and none is written to: the two models may share them.

    Arguments:
        original: a copy of the original, in place.
        rewritten: what the record is of.
        record: the record of a rewrite, for which `has_weights_for` holds.
    """
    made: dict[str, torch.Tensor] = {}
    for one in record.matrices:
        weight = _own(made, original, one.weight)
        _as_matrix(weight).movedim(one.axis, 0)[list(one.rows)] = dense(rewritten, one).t().to(weight.dtype)
        if one.bias is not None and one.shared_bias is not None:
            bias = _own(made, original, one.bias)
            bias[list(one.rows)] = rewritten.get_parameter(one.shared_bias).detach()[list(one.shared_rows)]
    for path, value in made.items():
        owner, _, name = path.rpartition(".")
        original.get_submodule(owner)._parameters[name] = torch.nn.Parameter(value, requires_grad=False)


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


def _as_matrix(parameter: torch.Tensor) -> torch.Tensor:
    """A view without the axes of a kernel, which has one position, where the parameter is that of a convolution."""
    return parameter.view(parameter.shape[:2])


def _own(made: dict[str, torch.Tensor], original: torch.nn.Module, path: str) -> torch.Tensor:
    """The new value of a parameter as far as it is made; at first what it was."""
    if path not in made:
        made[path] = original.get_parameter(path).detach().clone()
    return made[path]
