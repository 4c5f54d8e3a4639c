"""How long a projection with a residual takes in both lowerings: what `lowering=auto` of a residual pass compares."""

from __future__ import annotations

import dataclasses

import torch

from .device import Device


@dataclasses.dataclass(frozen=True)
class ResidualMatrix:
    """A product of ``tokens`` rows with a weight (``inputs`` × ``outputs``) that has a residual of some rank.

    What both lowerings do, the product itself, is in neither time.
    """

    tokens: int
    inputs: int
    outputs: int
    rank: int
    diagonal: bool = True
    dtype: torch.dtype = torch.float32

    def factored(self, device: Device) -> float:
        """Seconds that ``(x A) B + x ∘ D`` adds: two narrow products, and a pass over what the diagonal reaches.

        The narrow products read and write whole rows of tokens for little arithmetic: none is faster than the cache.
        """
        first = self._product(device, self.tokens, self.rank, self.inputs)
        second = self._product(device, self.tokens, self.outputs, self.rank)
        seconds = _together(device, first, device.dispatch("linear"))
        seconds += _together(device, second, device.dispatch("linear"))
        if self.diagonal:
            elements = self.tokens * min(self.inputs, self.outputs)
            work = max(elements * device.element("add"), 3 * elements * self.dtype.itemsize / device.cache_rate)
            seconds += _together(device, work, device.dispatch("element"))
        return seconds

    def merged(self, device: Device) -> float:
        """Seconds that ``U + A B + D`` takes: one product, and a new matrix that is written, and read once more.

        On a CPU its pages are new, too: the C library gives large blocks back when they are free.
        """
        work = self._product(device, self.outputs, self.inputs, self.rank)
        size = self.inputs * self.outputs * self.dtype.itemsize
        away = max(0.0, 2 * size - device.cache) / device.memory + size * device.fault
        seconds = _together(device, work + away, device.dispatch("linear"))
        if self.diagonal:
            seconds += device.dispatch("view") + device.dispatch("element")
        return seconds

    def _product(self, device: Device, m: int, n: int, k: int) -> float:
        """A product whose result is added to what is there: read and written, like its first operand."""
        moved = (2 * m * n + m * k) * self.dtype.itemsize
        return max(device.product("linear", 1, m, n, k, self.dtype), moved / device.cache_rate)


def _together(device: Device, work: float, dispatch: float) -> float:
    """A CPU dispatches, then works; an accelerator does both at a time."""
    return max(work, dispatch) if device.asynchronous else work + dispatch
