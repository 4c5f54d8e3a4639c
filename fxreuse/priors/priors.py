"""Priors on the keys of an attention: what they start at, and what they add to the scores.

A finite admixture of keys (Nguyen et al., equation 8) weighs the attention that query i pays to key j by π_ij:
``a_ij ∝ |π_ij|·exp(q_i·k_j/√D)``. That is a softmax of the scores plus ``log |π_ij|``. A mixture (equation 5) has one
π_j for all queries.
"""

from __future__ import annotations

import torch


def initial_prior(shape: tuple[int, ...], kind: str, **options: object) -> torch.Tensor:
    """The uniform prior that training starts from: 1/√N for an admixture, 1/N for a mixture, of N keys.

    Arguments:
        shape: of the prior, keys last.
        kind: ``"admixture"`` or ``"mixture"``.
        options: dtype and device.

    >>> initial_prior((4, 4), "admixture")[0, 0], initial_prior((4,), "mixture")[0]
    (tensor(0.5000), tensor(0.2500))
    """
    value = shape[-1] ** (-0.5 if kind == "admixture" else -1.0)
    return torch.full(shape, value, **options)  # type: ignore[call-overload]


def log_prior(prior: torch.Tensor, kept: torch.Tensor | None = None, queries: int | None = None) -> torch.Tensor:
    """log |π| less the largest of it for each query: what a prior adds to the scores.

    A softmax does not notice what is taken off, so a uniform prior adds nothing at all, in any dtype. The magnitude is
    kept from zero by the smallest normal number; a prior that is below has no gradient, and its key no weight.

    Arguments:
        prior: π, of any sign: (queries, keys) of an admixture, (keys) of a mixture, heads in front where they have
            their own.
        kept: where False, the score is cut: minus infinity, and no gradient. Of the shape of the result.
        queries: the number of queries that a mixture is the same for.

    Returns:
        (queries, keys), or (heads, queries, keys).

    >>> log_prior(torch.tensor([0.5, -0.5, 0.25]), queries=1)
    tensor([[ 0.0000,  0.0000, -0.6931]])
    """
    logarithm = prior.abs().clamp_min(torch.finfo(prior.dtype).tiny).log()
    if queries is not None:
        logarithm = logarithm.unsqueeze(-2).expand(*logarithm.shape[:-1], queries, logarithm.shape[-1])
    if kept is not None:
        logarithm = logarithm.masked_fill(~kept, -torch.inf)
    return logarithm - logarithm.detach().amax(-1, keepdim=True)
