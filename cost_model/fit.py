"""Least squares with coefficients that are not negative, for a handful of terms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch


def fit_times(
    terms: Sequence[Sequence[float]], times: Sequence[float], known: Sequence[float] | None = None
) -> list[float]:
    """The coefficients, none negative, with which the terms come nearest to the times, in relative error.

    Every choice of terms is tried with the rest left out, which for up to five terms is at most 31 small systems.

    Arguments:
        terms: for every time, the value of each term.
        times: above 0.
        known: what is known of each time already; nothing where left out.

    >>> [round(value, 6) for value in fit_times([(1, 1), (2, 1), (3, 1)], [3.0, 5.0, 7.0])]
    [2.0, 1.0]
    >>> [round(value, 6) for value in fit_times([(1, 3), (2, 2), (3, 1)], [1.0, 2.0, 3.0])]
    [1.0, 0.0]
    """
    relative = torch.tensor(terms, dtype=torch.float64) / torch.tensor(times, dtype=torch.float64)[:, None]
    scale = relative.abs().amax(0).clamp_min(1e-300)
    matrix, wanted = relative / scale, torch.ones(len(times), 1, dtype=torch.float64)
    if known is not None:
        wanted = wanted - (torch.tensor(known, dtype=torch.float64) / torch.tensor(times, dtype=torch.float64))[:, None]
    count = matrix.shape[1]
    best, found = float(wanted.square().sum()), [0.0] * count
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            part = matrix[:, chosen]
            solution = torch.linalg.lstsq(part, wanted, driver="gelsd").solution
            error = float((part @ solution - wanted).square().sum())
            if bool((solution >= 0).all()) and error < best * (1 - 1e-9):
                best = error
                found = [0.0] * count
                for place, value in zip(chosen, (solution[:, 0] / scale[list(chosen)]).tolist(), strict=True):
                    found[place] = value
    return found
