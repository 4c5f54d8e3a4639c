"""How many keys a fused attention gets beside those that are left, so that rows of scores fill the vectors of a CPU."""

from __future__ import annotations

import torch

# The keys that the fused kernel of a CPU takes at a time.
_KEY_BLOCK = 512
# Bytes by which rows of scores are to be counted, for the kernel not to be slowed down.
_LINE = 64
# In units of the time of a score in a full row (`benchmarks/fiak_latency.py kernel` measures them): what one takes in
# excess in another row, what a mask that is the same for all queries takes, and what the projections of a key and a
# value take for each channel.
_IN_EXCESS = 0.2
_MASK = 0.05
_CHANNEL = 0.6


def filling(
    keys: int, queries: int, channels: int, masked: bool, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> int:
    """How many keys to add to those that are left, hidden by a mask; 0 where that does not make an attention faster.

    Arguments:
        keys: how many keys are left.
        queries: how many queries there are.
        channels: how wide the heads are together, which is about as wide as what is projected.
        masked: whether there is a mask anyway.
        dtype: what is computed in.
        device: where.

    >>> filling(158, 197, 192, masked=False), filling(160, 197, 192, masked=False), filling(9, 12, 16, masked=True)
    (2, 0, 0)
    """
    if device not in ("cpu", "meta") or dtype not in (torch.float32, torch.float64):
        return 0
    last = keys % _KEY_BLOCK
    added = -last % (_LINE // dtype.itemsize)
    gained = queries * (_IN_EXCESS * last - added - (0.0 if masked else _MASK * keys))
    return added if gained > _CHANNEL * added * channels else 0
