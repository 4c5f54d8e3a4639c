"""How long the attentions of a stack take in both lowerings of a shared map: what `lowering=auto` compares."""

from __future__ import annotations

import dataclasses

import torch

from .attention_blocks import KEY_BLOCK, visible_part
from .device import Device
from .residency import Caches

# Seconds that are longer than a shared cache keeps anything.
_LONG = 1.0


@dataclasses.dataclass(frozen=True)
class SharedMap:
    """An attention whose map several layers use.

    ``heads`` counts those of all samples; ``width`` and ``values`` are the widths of a head's keys and values;
    ``layers`` use the map, the one that computes it among them. ``masked``: a mask in memory is added to the scores.
    """

    heads: int
    queries: int
    keys: int
    width: int
    values: int
    layers: int
    dtype: torch.dtype = torch.float32
    causal: bool = False
    masked: bool = False

    def stored(self, device: Device) -> float:
        """Seconds of all layers where the first one writes the map to memory and all read it.

        From a certain size on, the map does not fit into a core's own cache, and beyond that of the last-level cache it
        goes to memory and comes back for the softmax and for every product. Where others share that cache, followers
        find nothing of it there: what a layer does between two uses takes longer than such a cache keeps anything.
        """
        scores = self.heads * self.queries * self.keys
        size = scores * self.dtype.itemsize
        product = device.product("batched", self.heads, self.queries, self.keys, self.width, self.dtype)
        softmax = scores * device.element("softmax")
        context = device.product("batched", self.heads, self.queries, self.values, self.keys, self.dtype)
        written, added = _moved(device, "batched", size), _moved(device, "write", size)
        extra = scores * device.element("add") + added if self.causal or self.masked else 0.0
        once = product + written + softmax + added + extra + device.dispatch("map")
        found = _moved(device, "batched", size, _LONG)
        follows = self.layers * (context + device.dispatch("batched")) + (self.layers - 1) * found
        return once + written + follows

    def computed_again(self, device: Device) -> float:
        """Seconds of all layers where each runs fused attention on the queries and keys of the first one."""
        part = visible_part(self.keys, KEY_BLOCK if device.kind == "cpu" else 1) if self.causal else 1.0
        scores = part * self.heads * self.queries * self.keys
        both = self.width + self.values
        seconds = device.product("attention", self.heads, self.queries, part * self.keys, both, self.dtype)
        seconds += scores * (device.score + (device.masked_score if self.masked else 0.0))
        if self.masked:
            seconds += _moved(device, "batched", scores * self.dtype.itemsize)
        return self.layers * (seconds + device.dispatch("attention"))


def _moved(device: Device, use: str, size: float, seconds: float = 0.0) -> float:
    """What it costs to go through a map that was last touched as a whole, so many seconds ago.

    One that is written is read before, too.
    """
    if device.asynchronous:
        return (2 if use == "write" else 1) * max(0.0, size - device.cache) / device.memory
    outer, memory = Caches(device.own_cache, device.cache, device.retention).missed(size, 0.0, seconds)
    return device.missed(use, outer, memory)
