"""Products with a shared weight and residuals as functions, which in inference add everything up in one place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

#: A (inputs × rank), B (rank × outputs), and D (the smaller of inputs and outputs) or None.
Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]

_PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor)
# Up to so many rows two operators of two operands take less time than `addcmul`, which costs more to call.
_FEW = 16


def residual_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residuals: Sequence[Factors]
) -> torch.Tensor:
    """``x Wᵀ + b``, and for each residual ``(x A) B + x ∘ D`` on output features of its own.

    ``x ∘ D`` is x, cut to D's length, times D; the features beyond that get nothing of it. In inference the products
    are added up in place, in a tensor that is new, so that the result is written once less for each of them. Where
    gradients are recorded, a graph is traced, or a transform or autocast is at work, there are separate operators only,
    which those know. Both are the same sum (ResidualTransformer, eq. 2 and 3).

    Arguments:
        x: (…, inputs).
        weight: outputs × inputs.
        bias: outputs, or None.
        residuals: their outputs make up those of the weight, in order.

    Returns:
        (…, outputs).

    >>> a, b, d = torch.ones(2, 1), torch.ones(1, 3), torch.tensor([1.0, 10.0])
    >>> residual_linear(torch.tensor([[1.0, 2.0]]), torch.zeros(3, 2), None, [(a, b, d)])
    tensor([[ 4., 23.,  3.]])
    """
    if _is_plain_inference(x, weight):
        rows = x.reshape(-1, x.shape[-1])
        return _in_place(rows, weight, bias, residuals).view(*x.shape[:-1], weight.shape[0])
    added = [residual_product(x, *residual) for residual in residuals]
    return F.linear(x, weight, bias) + (added[0] if len(added) == 1 else torch.cat(added, -1))


def residual_product(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor | None) -> torch.Tensor:
    """``(x A) B + x ∘ D``, features last.

    >>> residual_product(torch.tensor([1.0, 2.0]), torch.zeros(2, 1), torch.zeros(1, 3), torch.tensor([5.0, 7.0]))
    tensor([ 5., 14.,  0.])
    """
    made = x @ a @ b
    if d is None:
        return made
    # Autocast computes products in another type than the parameters': what is added takes that.
    scaled = (x[..., : len(d)] * d).type_as(made)
    return made + F.pad(scaled, (0, b.shape[1] - len(d)))


def merged_weight(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, d: torch.Tensor | None
) -> torch.Tensor:
    """``weight + left · right``, with ``d`` added to the diagonal: a matrix with its residual, put together.

    >>> merged_weight(torch.zeros(2, 2), torch.ones(2, 1), torch.ones(1, 2), torch.tensor([1.0, 2.0]))
    tensor([[2., 1.],
            [1., 3.]])
    """
    made = torch.addmm(weight, left, right)
    if d is None:
        return made
    if _is_plain_inference(weight, left):
        made.diagonal().add_(d)
        return made
    # Compiled, this is in place, too: what is written into is new.
    return torch.diagonal_scatter(made, made.diagonal() + d)


def _in_place(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residuals: Sequence[Factors],
) -> torch.Tensor:
    """The sum over rows of inputs. For one token, what a call costs is what counts: there are as few as can be."""
    narrow = [torch.mm(rows, a) for a, _, _ in residuals]
    if len(residuals) > 1:
        made = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        start = 0
        for (_, b, d), product in zip(residuals, narrow, strict=True):
            own = made[:, start : start + b.shape[1]]
            start += b.shape[1]
            own.addmm_(product, b)
            if d is not None:
                _add_diagonal(own, rows, d)
        return made
    _, b, d = residuals[0]
    if d is not None and d.shape[0] == weight.shape[0]:
        # The diagonal takes the place of the copies of the bias that the product is added to.
        cut = rows if d.shape[0] == rows.shape[1] else rows[:, : d.shape[0]]
        if bias is None:
            made = cut * d
        elif rows.shape[0] > _FEW:
            made = torch.addcmul(bias, cut, d)
        else:
            made = (cut * d).add_(bias)
        made.addmm_(rows, weight.t())
    else:
        made = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
        if d is not None:
            _add_diagonal(made, rows, d)
    return made.addmm_(narrow[0], b)


def _add_diagonal(made: torch.Tensor, rows: torch.Tensor, d: torch.Tensor) -> None:
    size = d.shape[0]
    cut = rows if size == rows.shape[1] else rows[:, :size]
    place = made if size == made.shape[1] else made[:, :size]
    if rows.shape[0] > _FEW:
        place.addcmul_(cut, d)
    else:
        place.add_(cut * d)


def _is_plain_inference(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether nothing but plain tensors is computed, and nothing looks at how."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return False
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    return type(x) in _PLAIN and type(weight) in _PLAIN
