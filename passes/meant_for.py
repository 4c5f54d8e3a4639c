"""The device that a rewrite is meant for, where that is another one than its tensors are on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fxreuse.cost_model.device import Device

_MEANT: ContextVar[Device | None] = ContextVar("meant", default=None)


@contextmanager
def meant_for(device: Device) -> Iterator[None]:
    """Choose lowerings for this device in the meantime: a report of an A100 is made where there is none.

    >>> with meant_for(Device.preset("A100")):
    ...     intended().name
    'A100'
    """
    token = _MEANT.set(device)
    try:
        yield
    finally:
        _MEANT.reset(token)


def intended() -> Device | None:
    """The device that was named; None where a rewrite is for the one that its tensors are on."""
    return _MEANT.get()
