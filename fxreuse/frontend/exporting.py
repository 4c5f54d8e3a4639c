"""What a model's code is told while it is exported, for runs beside the export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Meanwhile, `torch.compiler.is_compiling` and `torch.compiler.is_exporting` are true, as under `torch.export`.

    A model that asks (to leave out a check, or to keep no table) does the same here as in its graph.

    >>> with exporting():
    ...     torch.compiler.is_compiling(), torch.compiler.is_exporting()
    (True, True)
    """
    with mock.patch.multiple(torch.compiler, _is_compiling_flag=True, _is_exporting_flag=True):
        yield
