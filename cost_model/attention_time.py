"""How long the attentions of a stack take in both lowerings of a shared map: what `lowering=auto` compares."""

from __future__ import annotations

import dataclasses

import torch

from .device import Device

# The fused attention of a CPU computes blocks of so many keys; one that a causal mask hides whole, it skips.
KEY_BLOCK = 512


def visible_part(keys: int, blocks: int = KEY_BLOCK) -> float:
    """The part of a causal map that is computed by an attention which skips blocks of keys.

    >>> visible_part(512), visible_part(2048)
    (1.0, 0.625)
    """
    return min(1.0, 0.5 + blocks / (2 * max(1, keys)))


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

        From a certain size on, the map does not fit into cache: it goes to memory and comes back for the softmax and
        for every product.
        """
        scores = self.heads * self.queries * self.keys
        size = scores * self.dtype.itemsize
        away = device.away(max(0.0, size - device.cache))  # once through, there or back
        product = device.product("batched", self.heads, self.queries, self.keys, self.width, self.dtype)
        softmax = scores * device.element("softmax")
        context = device.product("batched", self.heads, self.queries, self.values, self.keys, self.dtype)
        extra = scores * device.element("add") + 2 * away if self.causal or self.masked else 0.0
        once = product + away + softmax + 2 * away + extra + device.dispatch("map")
        return once + self.layers * (context + away + device.dispatch("batched"))

    def computed_again(self, device: Device) -> float:
        """Seconds of all layers where each runs fused attention on the queries and keys of the first one."""
        part = visible_part(self.keys, KEY_BLOCK if device.kind == "cpu" else 1) if self.causal else 1.0
        scores = part * self.heads * self.queries * self.keys
        both = self.width + self.values
        seconds = device.product("attention", self.heads, self.queries, part * self.keys, both, self.dtype)
        seconds += scores * (device.score + (device.masked_score if self.masked else 0.0))
        if self.masked:
            size = scores * self.dtype.itemsize
            seconds += device.away(max(0.0, size - device.cache))
        return self.layers * (seconds + device.dispatch("attention"))
