"""Random values for example inputs: small sizes that differ, and a generator of their own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

BATCH = 2
LENGTH = 7
OTHER_LENGTH = 5


def length_beside(width: int, length: int = LENGTH) -> int:
    """That length, or another one where the width is the same.

    >>> length_beside(64), length_beside(7)
    (7, 11)
    """
    return length + 4 if length == width else length


class Sampler:
    """Draws values on the device of a model, in its precision, without touching the global random state.

    >>> Sampler(nn.Linear(3, 3).double()).normal(2, 7).dtype
    torch.float64
    """

    def __init__(self, model: nn.Module) -> None:
        first = next(model.parameters(), None)
        floating = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        self._device = torch.device("cpu") if first is None else first.device
        self._dtype = next(floating, torch.get_default_dtype())
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Normally distributed values of that shape."""
        values = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return values.to(self._device, self._dtype)

    def ids(self, vocabulary: int, avoid: Iterable[int], *shape: int) -> Tensor:
        """Token ids below the size of the vocabulary, none of them among those to avoid, unless all of them are.

        >>> Sampler(nn.ReLU()).ids(3, [0, 2], 1, 4)
        tensor([[1, 1, 1, 1]])
        """
        avoided = torch.tensor(sorted(set(avoid)), dtype=torch.long, device="cpu")
        every = torch.arange(vocabulary, device="cpu")
        allowed = every[~torch.isin(every, avoided)]
        if not allowed.numel():
            allowed = every
        drawn = torch.randint(allowed.numel(), shape, generator=self._generator, device="cpu")
        return allowed[drawn].to(self._device)
