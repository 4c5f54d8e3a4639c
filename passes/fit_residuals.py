"""Fit one shared matrix, and for each layer a product of low rank and a diagonal, to the matrices of several layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

# A sweep that lowers the squared error by less than this part of it is the last one.
_TOLERANCE = 1e-4
_SWEEPS = 200
# So many sweeps begin with exact truncations; of large matrices, those after them iterate from where they are.
_EXACT_SWEEPS = 3
_SMALL = 160


@dataclasses.dataclass(frozen=True)
class Factors:
    """The residual of a layer: ``a @ b`` (inputs × rank, rank × outputs) and a rectangular diagonal ``d``, or none."""

    a: torch.Tensor
    b: torch.Tensor
    d: torch.Tensor | None

    def to(self, dtype: torch.dtype) -> Factors:
        """The same in another dtype."""
        return Factors(self.a.to(dtype), self.b.to(dtype), None if self.d is None else self.d.to(dtype))

    def dense(self) -> torch.Tensor:
        """The residual as one matrix.

        >>> Factors(torch.ones(2, 1), torch.ones(1, 3), torch.tensor([1.0, 2.0])).dense().tolist()
        [[2.0, 1.0, 1.0], [1.0, 3.0, 1.0]]
        """
        made = self.a @ self.b
        if self.d is not None:
            made.diagonal().add_(self.d)
        return made


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A shared matrix and residuals, and for each layer ‖W − U − AB − D‖ / ‖W‖ in Frobenius norms."""

    shared: torch.Tensor
    factors: tuple[Factors, ...]
    errors: tuple[float, ...]


def fit_residuals(weights: Sequence[torch.Tensor], rank: int, diagonal: bool = True) -> Fitted:
    """The least-squares fit of U, A_l, B_l and D_l to matrices W_l ≈ U + A_l B_l + D_l (ResidualTransformer, eq. 3).

    It starts from U = mean of W_l and the truncated singular value decompositions of what is left. Then layer by layer
    A_l B_l is set to what is best together with the best U: for given residuals of the others, with S the mean of
    W_j − A_j B_j over them, the error is a constant plus (K−1)/K · ‖W_l − S − A_l B_l‖², so that it is the truncation
    of W_l − S. (With U held, two layers would stay at their start, where their residuals are opposite, and use half of
    the rank that they have.) The diagonals take whatever stands on the diagonal, which is therefore free in all
    truncations. No step makes the error larger; sweeps end when one lowers it by less than 1e-4 of it.

    Arguments:
        weights: the matrices of a group of layers, inputs × outputs.
        rank: the rank of the products; at most the smaller side.
        diagonal: whether there are diagonals.

    >>> a, b = torch.randn(6, 1), torch.randn(1, 8)
    >>> base = torch.randn(6, 8)
    >>> fitted = fit_residuals([base + a @ b, base - 2 * a @ b], rank=1)
    >>> max(fitted.errors) < 1e-6
    True
    """
    stacked = torch.stack([weight.detach().to(torch.float64) for weight in weights])
    turned = stacked.shape[1] > stacked.shape[2]
    given = stacked.transpose(1, 2).contiguous() if turned else stacked
    products = _products(given, rank, diagonal)
    left = given - torch.stack([basis @ inner for basis, inner in products])
    shared = left.mean(0)
    factors = []
    for rest, (basis, inner) in zip(left, products, strict=True):
        a, b = _balanced(basis, inner, float(stacked.norm()))
        d = (rest - shared).diagonal().clone() if diagonal else None
        a, b = (b.t(), a.t()) if turned else (a, b)
        factors.append(Factors(a.contiguous(), b.contiguous(), d))
    shared = shared.t().contiguous() if turned else shared
    errors = [_relative(weight - shared - one.dense(), weight) for weight, one in zip(stacked, factors, strict=True)]
    return Fitted(shared, tuple(factors), tuple(errors))


def start_at_zero(shape: tuple[int, int], rank: int, diagonal: bool, like: torch.Tensor) -> Factors:
    """A residual that is zero and can learn: A random as `torch.nn.Linear` draws its weights, B and D zero (LoRA).

    >>> float(start_at_zero((4, 6), 2, True, torch.empty(0)).dense().abs().sum())
    0.0
    """
    inputs, outputs = shape
    a = like.new_empty(inputs, rank)
    if not a.is_meta:
        a.uniform_(-(inputs**-0.5), inputs**-0.5)
    d = like.new_zeros(min(shape)) if diagonal else None
    return Factors(a, like.new_zeros(rank, outputs), d)


def _products(given: torch.Tensor, rank: int, diagonal: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each matrix an orthonormal basis (inputs × rank) and what stands in it (rank × outputs)."""
    count = len(given)
    rest = given - given.mean(0)
    found = [_truncated(one, rank) for one in rest]
    if count == 1:
        return found
    product = torch.stack([basis @ inner for basis, inner in found])
    left = given - product
    total = left.sum(0)
    error = _error(left, diagonal)
    floor = 1e-28 * float(given.square().sum())
    for sweep in range(_SWEEPS):
        if error <= floor:
            break
        for layer in range(count):
            total -= left[layer]
            aim = given[layer] - total / (count - 1)
            if diagonal:
                aim.diagonal().copy_(product[layer].diagonal())
            exact = sweep < _EXACT_SWEEPS or len(aim) <= _SMALL
            found[layer] = _truncated(aim, rank) if exact else _iterated(aim, found[layer][0])
            product[layer] = found[layer][0] @ found[layer][1]
            left[layer] = given[layer] - product[layer]
            total += left[layer]
        before, error = error, _error(left, diagonal)
        if before - error <= _TOLERANCE * before:
            break
    return found


def _error(left: torch.Tensor, diagonal: bool) -> float:
    """The squared error that is left with the best shared matrix, and the best diagonals."""
    rest = left - left.mean(0)
    squares = rest.square().sum()
    if diagonal:
        squares = squares - torch.diagonal(rest, dim1=1, dim2=2).square().sum()
    return float(squares)


def _truncated(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The truncated singular value decomposition of a matrix that is no taller than wide, as basis and inner part."""
    basis = torch.linalg.eigh(matrix @ matrix.t()).eigenvectors[:, -rank:]
    return basis, basis.t() @ matrix


def _iterated(matrix: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of alternating least squares towards the truncation, from the basis that there is."""
    basis = torch.linalg.qr(matrix @ (matrix.t() @ basis)).Q
    return basis, basis.t() @ matrix


def _balanced(basis: torch.Tensor, inner: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with factors of equal size, which learn at the same pace.

    Directions in which it is zero, measured by ``scale``, would never learn: there the first factor is random, and the
    second one zero.
    """
    left, values, right = torch.linalg.svd(inner, full_matrices=False)
    roots = values.sqrt()
    empty = values <= 1e-14 * scale
    a, b = basis @ left * roots, roots[:, None] * right
    size = len(basis) ** -0.5
    a[:, empty] = torch.empty(len(basis), int(empty.sum()), dtype=a.dtype, device=a.device).uniform_(-size, size)
    b[empty] = 0.0
    return a, b


def _relative(difference: torch.Tensor, weight: torch.Tensor) -> float:
    size = float(weight.norm())
    return float(difference.norm()) / size if size else float(difference.norm())
