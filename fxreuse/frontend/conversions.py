"""Modules that convert a part of themselves while they run (``self.classifier.to(self.dtype)``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch


@contextlib.contextmanager
def idle_conversions() -> Iterator[None]:
    """Meanwhile, ``module.to(…)`` does nothing where the module is that already.

    Under `torch.export` a conversion swaps every parameter for the converted one, which fails, even where the two are
    the same. One that changes a dtype or a device fails as before: a graph has no place for it.

    >>> layer = torch.nn.Linear(2, 2)
    >>> weight = layer.weight
    >>> with idle_conversions():
    ...     layer.to(torch.float32).weight is weight, layer.to(torch.float64).weight.dtype
    (True, torch.float64)
    """
    convert = torch.nn.Module.to

    def to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        tensors = (*module.parameters(), *module.buffers())
        same = memory_format is None and all(
            device in (None, t.device) and (dtype in (None, t.dtype) or not t.is_floating_point()) for t in tensors
        )
        return module if same else convert(module, *args, **kwargs)

    with mock.patch.object(torch.nn.Module, "to", to):
        yield
