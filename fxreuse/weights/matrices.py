"""The matrix of a projection as the papers write it, inputs × outputs, read from its parameter and written into it."""

from __future__ import annotations

import torch

from ..layouts.projections import Projection


def read_matrix(parameter: torch.Tensor, projection: Projection, features: torch.Tensor) -> torch.Tensor:
    """The matrix that makes some output features of a projection: inputs × features, a copy.

    Arguments:
        parameter: the projection's weight.
        projection: where it is read.
        features: which output features.
    """
    rows, columns = _indices(parameter, projection, features)
    found = as_matrix(parameter.detach()).index_select(projection.axis, rows)
    found = found.index_select(projection.inputs, columns)
    return found.t() if projection.axis == 0 else found


def write_matrix(parameter: torch.Tensor, projection: Projection, features: torch.Tensor, matrix: torch.Tensor) -> None:
    """Put a matrix (inputs × features) where `read_matrix` has it from."""
    rows, columns = _indices(parameter, projection, features)
    matrix = matrix.to(parameter.dtype)
    with torch.no_grad():
        place = as_matrix(parameter)
        if projection.axis == 0:
            place[rows[:, None], columns] = matrix.t()
        else:
            place[columns[:, None], rows] = matrix


def as_matrix(parameter: torch.Tensor) -> torch.Tensor:
    """A view of two dimensions: of a convolution over one position without the axes of its kernel.

    >>> as_matrix(torch.zeros(4, 3, 1)).shape
    torch.Size([4, 3])
    """
    return parameter.view(parameter.shape[:2])


def _indices(
    parameter: torch.Tensor, projection: Projection, features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return projection.rows[features].to(parameter.device), projection.columns.to(parameter.device)
