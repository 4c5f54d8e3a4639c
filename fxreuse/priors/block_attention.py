"""Attention over some blocks of queries and keys only, in two ways that skip the others.

Blocks are squares of a fixed side. `gathered_attention` runs the fused operator for every row of blocks on the keys
that the row has; it is ordinary differentiable tensor code. `flex_attention_over_blocks` runs FlexAttention, compiled,
where no gradient is recorded, and the fused operator with a mask elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Counts = tuple[tuple[int, ...], ...]

# Of FlexAttention's kernels on accelerators: the sides of tiles, the widths of heads that torch has tuned them for, the
# numbers that they take, and the bytes of shared memory that GPUs of compute capability 8.0 and later have at least.
_TILE, _LARGEST_TILE = 16, 128
_TUNED_WIDTHS = (64, 128, 256)
_NUMBERS = (torch.float32, torch.float16, torch.bfloat16)
_SHARED_MEMORY = 96 * 1024
# By the tensor of blocks: its version, and what FlexAttention takes.
_block_masks: Any = WeakIdKeyDictionary()


def gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
    pairs: int,
    columns: Tensor,
    counts: Counts,
    block: int,
    positions: Tensor | None = None,
) -> Tensor:
    """Attention in which every row of blocks sees its own keys.

    Keys and values are gathered block by block, which is a few large copies.

    Arguments:
        query: (…, heads, queries, width). Shorter ones than the blocks are for are their leading part.
        key: (…, heads, keys, width).
        value: (…, heads, keys, value width).
        mask: as that of the fused operator, or None.
        dropout_p: the probability with which a weight is dropped.
        scale: what the scores are multiplied by; None for 1/√width.
        enable_gqa: whether there are fewer heads of keys and values than of queries.
        pairs: how many pairs of a query and a key all heads have in their blocks, from which the work is counted.
        columns: which blocks of keys every row of blocks has, ascending, row after row, those of further heads behind
            them.
        counts: for every head, or for all together, how many keys each row has.
        block: the side of a block.
        positions: where each key stands among the queries, if no query sees a key behind it.

    >>> x = torch.randn(1, 1, 4, 8)
    >>> whole = F.scaled_dot_product_attention(x, x, x)
    >>> found = gathered_attention(x, x, x, None, 0.0, None, False, 12, torch.tensor([0, 1, 1]), ((4, 2),), 2)
    >>> torch.allclose(found[..., :2, :], whole[..., :2, :], atol=1e-6)
    True
    """
    whole = key.shape[-2] if positions is None else positions.shape[0]
    blocks = _in_blocks(key, whole, block), _in_blocks(value, whole, block)
    seen = None if positions is None else _Positions(positions, block)
    offset, heads = 0, []
    for head, row_counts in enumerate(counts):
        one = slice(head, head + 1) if len(counts) > 1 else slice(None)
        own = slice(head // _group(query, key), head // _group(query, key) + 1) if len(counts) > 1 else slice(None)
        own_mask = mask if mask is None or mask.dim() < 3 or mask.shape[-3] == 1 else mask[..., one, :, :]
        parts = []
        for row, count in enumerate(row_counts):
            rows = slice(row * block, min((row + 1) * block, query.shape[-2]))
            chosen, offset = columns[offset : offset - (-count // block)], offset - (-count // block)
            if rows.start >= query.shape[-2]:
                continue
            own_keys, own_values = (_gathered(each[..., own, :, :, :], chosen, -3)[..., :count, :] for each in blocks)
            parts.append(
                F.scaled_dot_product_attention(
                    query[..., one, rows, :],
                    own_keys,
                    own_values,
                    _mask_of(own_mask, rows, chosen, count, block, seen),
                    dropout_p,
                    scale=scale,
                    enable_gqa=enable_gqa and len(counts) == 1,
                )
            )
        heads.append(torch.cat(parts, -2))
    return heads[0] if len(heads) == 1 else torch.cat(heads, -3)


def _group(query: Tensor, key: Tensor) -> int:
    """How many heads of queries share one of keys."""
    return query.shape[-3] // key.shape[-3] if query.dim() > 2 else 1


def _in_blocks(values: Tensor, whole: int, block: int) -> Tensor:
    """(…, blocks, block, width) of values that have up to ``whole`` keys; what is missing is zero."""
    missing = whole + -whole % block - values.shape[-2]
    return (F.pad(values, (0, 0, 0, missing)) if missing else values).unflatten(-2, (-1, block))


def _gathered(blocks: Tensor, chosen: Tensor, dim: int) -> Tensor:
    """Some blocks, one behind another."""
    return blocks.index_select(dim, chosen).flatten(dim, dim + 1)


class _Positions:
    """Where keys stand among the queries, in blocks; what fills the last block stands behind all."""

    def __init__(self, positions: Tensor, block: int) -> None:
        padded = F.pad(positions, (0, -len(positions) % block), value=torch.iinfo(positions.dtype).max)
        self._blocks = padded.unflatten(0, (-1, block))

    def seen(self, rows: slice, chosen: Tensor, count: int) -> Tensor:
        """Which queries of a row of blocks see which of its keys."""
        queries = torch.arange(rows.start, rows.stop, device=chosen.device)
        return _gathered(self._blocks, chosen, 0)[:count] <= queries.unsqueeze(-1)


def _mask_of(
    mask: Tensor | None, rows: slice, chosen: Tensor, count: int, block: int, positions: _Positions | None
) -> Tensor | None:
    """The part of a mask that some queries and keys have, and that no query sees a key behind it."""
    if mask is not None:
        mask = mask if mask.shape[-2] == 1 else mask[..., rows, :]
        if mask.shape[-1] != 1:
            index = (chosen.unsqueeze(-1) * block + torch.arange(block, device=chosen.device)).flatten()[:count]
            mask = mask.index_select(-1, index.clamp(max=mask.shape[-1] - 1))
    if positions is None:
        return mask
    seen = positions.seen(rows, chosen, count)
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)


def flex_attention_over_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
    pairs: int,
    blocks: Tensor,
    block: int,
    positions: Tensor | None = None,
) -> Tensor:
    """Attention over the blocks that are True in ``blocks``, (heads or 1, rows, columns).

    The other arguments are those of `gathered_attention`. Where a gradient is recorded, weights are dropped, another
    mask has to be seen to, or FlexAttention's kernel does not take such operands, it is the fused operator with a mask:
    FlexAttention has no backward on a CPU, and on an accelerator it takes tiles of 16 numbers at least.

    >>> x = torch.randn(1, 1, 4, 8)
    >>> blocks = torch.tensor([[[True, False], [True, True]]])
    >>> flex_attention_over_blocks(x, x.requires_grad_(), x, None, 0.0, None, False, 12, blocks, 2).shape
    torch.Size([1, 1, 4, 8])
    """
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    whole = query.dim() == 4 and query.shape[-2] == blocks.shape[-2] * block
    refused = refused_by_kernel(query.device, block, (query.shape[-1], value.shape[-1]), query.dtype)
    if training or dropout_p or mask is not None or not whole or refused:
        return _masked(query, key, value, mask, dropout_p, scale, enable_gqa, blocks, block, positions)
    block_mask = _block_mask(blocks, block, key.shape[-2], positions)
    run = _flex if torch.compiler.is_compiling() else _compiled_flex()
    return run(query, key, value, block_mask, scale, enable_gqa, blocks, block, positions)


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
    blocks: Tensor,
    block: int,
    positions: Tensor | None,
) -> Tensor:
    """The fused operator, with the blocks as a mask."""
    visible = visible_of(blocks, block, query.shape[-2], key.shape[-2], positions)
    if mask is not None:
        visible = visible & mask if mask.dtype == torch.bool else mask.masked_fill(~visible, -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, visible, dropout_p, scale=scale, enable_gqa=enable_gqa)


def flex_tiles(block: int, widths: Sequence[int], itemsize: int) -> dict[str, Any] | None:
    """The sides of FlexAttention's tiles on an accelerator: blocks are made of whole ones, which fit in shared memory.

    Left to itself the kernel takes tiles of up to 128 queries and keys, by the device and the type of numbers, and
    refuses blocks that these do not divide.

    Arguments:
        block: the side of a block.
        widths: of heads of queries, and of values.
        itemsize: the bytes of a number.

    Returns:
        Options of the kernel. None where every side that it may take by itself is right.

    >>> flex_tiles(256, (64, 64), 4), flex_tiles(96, (64, 64), 4)
    (None, {'BLOCK_M': 32, 'BLOCK_N': 32, 'FORCE_USE_FLEX_ATTENTION': True})
    """
    if block % _LARGEST_TILE == 0 and widths[0] == widths[1] and widths[0] in _TUNED_WIDTHS:
        return None
    side = min(block & -block, _LARGEST_TILE // 2)
    while side > _TILE and _tile_bytes(side, widths, itemsize) > _SHARED_MEMORY:
        side //= 2
    return {"BLOCK_M": side, "BLOCK_N": side, "FORCE_USE_FLEX_ATTENTION": True}


def _tile_bytes(side: int, widths: Sequence[int], itemsize: int) -> int:
    """What a tile of queries, two each of keys and values, and one of scores take, heads being powers of two wide."""
    query, value = (1 << (width - 1).bit_length() for width in widths)
    return itemsize * side * (3 * query + 2 * value + side)


def refused_by_kernel(device: torch.device, block: int, widths: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why FlexAttention's kernel on a device does not take some operands; None if it does.

    >>> refused_by_kernel(torch.device("cuda"), 24, (64, 64), torch.float32)
    'takes blocks whose side is a multiple of 16 on cuda, not of 24'
    """
    if device.type in ("cpu", "meta"):
        return None
    if block % _TILE:
        return f"takes blocks whose side is a multiple of {_TILE} on {device.type}, not of {block}"
    if min(widths) < _TILE:
        return f"takes heads of at least {_TILE} channels on {device.type}, not of {min(widths)}"
    if dtype not in _NUMBERS:
        known, found = ", ".join(str(kind).removeprefix("torch.") for kind in _NUMBERS), str(dtype)
        return f"takes {known} on {device.type}, not {found.removeprefix('torch.')}"
    if _tile_bytes(_TILE, widths, dtype.itemsize) > _SHARED_MEMORY:
        return f"takes narrower heads on {device.type}, not {max(widths)} channels of {dtype.itemsize} bytes"
    return None


def visible_of(blocks: Tensor, block: int, queries: int, keys: int, positions: Tensor | None) -> Tensor:
    """Which query sees which key, (heads or 1, queries, keys)."""
    seen = blocks.repeat_interleave(block, -1).repeat_interleave(block, -2)[..., :queries, :keys]
    if positions is None:
        return seen
    return seen & (positions[:keys] <= torch.arange(queries, device=blocks.device).unsqueeze(-1))


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Any,
    scale: float | None,
    enable_gqa: bool,
    blocks: Tensor,
    block: int,
    positions: Tensor | None,
) -> Tensor:
    """FlexAttention where it is compiled.

    Where it is not, as after more recompilations than torch allows, it would write every score: a mask is better.
    """
    if not torch.compiler.is_compiling():
        return _masked(query, key, value, None, 0.0, scale, enable_gqa, blocks, block, positions)
    from torch.nn.attention.flex_attention import flex_attention

    options: Any = None
    if query.device.type != "cpu":
        options = flex_tiles(block, (query.shape[-1], value.shape[-1]), query.dtype.itemsize)
    return flex_attention(query, key, value, None, block_mask, scale, enable_gqa, kernel_options=options)


@functools.cache
def _compiled_flex() -> Any:
    # With free lengths the kernel for CPUs does not compile (torch 2.13).
    return torch.compile(_flex, dynamic=False)


def _block_mask(blocks: Tensor, block: int, keys: int, positions: Tensor | None) -> Any:
    """The blocks in the form that FlexAttention takes; made once, and anew when others were loaded into them."""
    from torch.nn.attention.flex_attention import BlockMask

    if torch.compiler.is_compiling():
        return _new_block_mask(BlockMask, blocks, block, keys, positions)
    version, made = _block_masks.get(blocks, (None, None))
    if version != blocks._version:
        made = _new_block_mask(BlockMask, blocks, block, keys, positions)
        _block_masks[blocks] = blocks._version, made
    return made


def _new_block_mask(kind: Any, blocks: Tensor, block: int, keys: int, positions: Tensor | None) -> Any:
    rows, columns = blocks.shape[-2:]
    partial = torch.zeros_like(blocks)
    if positions is not None:
        ends = torch.arange(1, columns + 1, device=blocks.device).mul(block).clamp(max=keys) - 1
        partial = blocks & (positions[ends] > torch.arange(rows, device=blocks.device).mul(block).unsqueeze(-1))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # A compiled kernel skips blocks without asking. What writes every score knows them from here only.
        kept = blocks[head if blocks.shape[0] > 1 else 0, query // block, key // block]
        return kept if positions is None else kept & (positions[key] <= query)

    some, full = (_listed(chosen.unsqueeze(0)) for chosen in (partial, blocks & ~partial))
    lengths = rows * block, keys
    return kind.from_kv_blocks(*some, *full, BLOCK_SIZE=block, mask_mod=sees, seq_lengths=lengths)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """For every row how many blocks are chosen, and which, first the chosen ones."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1).int(), order.int()
