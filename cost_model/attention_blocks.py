"""The blocks that the fused attention of a CPU computes: of queries, which share keys and values, and of keys.

They are those of ATen's kernel, ``cpu_flash_attention``: a block of scores is computed, taken the softmax of and
multiplied with the values while it is in cache.
"""

from __future__ import annotations

#: Keys in a block; one that a causal mask hides whole is skipped.
KEY_BLOCK = 512
# From so many queries on, a block has so many; fewer make blocks of 32.
_QUERY_BLOCKS = ((768, 256), (192, 64))


def query_block(queries: float) -> int:
    """How many queries a block has.

    >>> query_block(100), query_block(500), query_block(1000)
    (32, 64, 256)
    """
    return next((block for least, block in _QUERY_BLOCKS if queries >= least), 32)


def visible_part(keys: int, blocks: int = KEY_BLOCK) -> float:
    """The part of a causal map that is computed by an attention which skips blocks of keys.

    >>> visible_part(512), visible_part(2048)
    (1.0, 0.625)
    """
    return min(1.0, 0.5 + blocks / (2 * max(1, keys)))
