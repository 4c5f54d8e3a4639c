"""Attention maps in inference: softmax(scale · QKᵀ + mask), written into storage that is kept and used again.

A T×T map is large enough for the C library to hand it back to the system when it is freed, so that writing the next one
faults in every page anew; from T = 2048 on that takes longer than the arithmetic. A rewritten model stores one map per
group of layers, one after the other, so one storage serves a whole stack.

`attention_map` is what rewritten graphs call. On a CPU, where no gradient is recorded, it calls the operator
``fxreuse::map_in_workspace``; everywhere else (training, accelerators, autocast, export) it is ordinary differentiable
tensor code.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import threading
import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

_aten = torch.ops.aten

# The C library keeps smaller blocks, and faults nothing in anew.
SMALLEST = 2**20
# Scores that are stored in another dtype are computed this many bytes at a time: they stay in cache.
_CHUNK = 2**22


class _Pool:
    """Blocks of memory that are lent as tensors, and lent again once no tensor, view or alias uses them any more.

    Who still uses a block is not counted here: the tensor's storage holds a reference to a buffer object, as any tensor
    made by `torch.frombuffer` does, and that object's end is the return of the block. So a result that somebody keeps,
    in whatever form, is never written to again.
    """

    def __init__(self, idle_blocks: int) -> None:
        self._idle_blocks = idle_blocks
        self._idle: list[torch.Tensor] = []
        self._lock = threading.RLock()  # a garbage collection inside the lock may return a block

    def renew_lock(self) -> None:
        """In a forked child: whoever held the lock is not there."""
        self._lock = threading.RLock()

    def lend(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat tensor with any content: of the smallest idle block that is large enough, or a new one.

        Where none is large enough, the idle ones have been outgrown and are freed.
        """
        size = count * dtype.itemsize
        with self._lock:
            outgrown = [block for block in self._idle if block.numel() < size]
            large = [block for block in self._idle if block.numel() >= size]
            block = min(large, key=torch.Tensor.numel, default=None)
            if block is None:
                self._idle = []
            else:
                self._idle = [other for other in self._idle if other is not block]
        del outgrown, large
        if block is None:
            block = torch.empty(size, dtype=torch.uint8)
        buffer = (ctypes.c_char * block.numel()).from_address(block.data_ptr())
        weakref.finalize(buffer, self._take_back, block).atexit = False
        return torch.frombuffer(buffer, dtype=dtype, count=count)

    def _take_back(self, block: torch.Tensor) -> None:
        with self._lock:
            self._idle.append(block)
            surplus = self._idle[: -self._idle_blocks]
            self._idle = self._idle[-self._idle_blocks :]
        del surplus

    def release(self) -> int:
        """Free the idle blocks. Returns their bytes."""
        with self._lock:
            idle, self._idle = self._idle, []
        return sum(block.numel() for block in idle)


# Enough for a decoder's self- and cross-attention in two threads.
IDLE_BLOCKS = 4
_POOL = _Pool(idle_blocks=IDLE_BLOCKS)
os.register_at_fork(after_in_child=_POOL.renew_lock)


def release_workspaces() -> int:
    """Free the memory that rewritten models keep for their attention maps between calls.

    Maps that are still in use, and results that somebody holds, are not touched; the next call takes new memory. At
    most four blocks are kept, none larger than the largest map so far.

    Returns:
        The number of bytes freed.

    >>> import torch
    >>> freed = release_workspaces()  # what earlier calls left
    >>> query = torch.zeros(1, 4, 512, 8)
    >>> attention = attention_map(query, query, None, False, 1.0)
    >>> release_workspaces()  # the map is in use
    0
    >>> del attention
    >>> release_workspaces()
    4194304
    """
    return _POOL.release()


def attention_map(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    safe: bool = True,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """softmax(scale · QKᵀ + mask) over the keys.

    Arguments:
        query: (…, queries, width).
        key: (…, keys, width).
        mask: added to the scores, or boolean with True where a query sees a key; broadcast to (…, queries, keys).
        is_causal: whether query i sees keys 0 to i only.
        scale: what the product is multiplied by.
        safe: whether a row that the mask leaves nothing of gives zeros, as fused attention does, and not NaN.
        dtype: of the result; None for that of the scores.

    Returns:
        The map, (…, queries, keys).

    >>> attention_map(torch.ones(1, 2, 3), torch.ones(1, 2, 3), None, True, 1.0)
    tensor([[[1.0000, 0.0000],
             [0.5000, 0.5000]]])
    """
    if _is_plain_inference(query, key, mask):
        return torch.ops.fxreuse.map_in_workspace(query, key, mask, is_causal, scale, safe, dtype)
    scores = torch.matmul(query * scale, key.transpose(-2, -1))  # scaled before: half precision is narrow
    if is_causal:
        scores = scores.masked_fill(_upper_triangle(query, key), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    found = _aten._safe_softmax(scores, -1) if safe and mask is not None else torch.softmax(scores, -1)
    return found if dtype is None else found.to(dtype)


def _is_plain_inference(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the result is a plain CPU tensor that nothing is differentiated through."""
    given = (query, key) if mask is None else (query, key, mask)
    if query.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if any(tensor.dtype not in (query.dtype, torch.bool) for tensor in given):
        return False  # the scores have the wider dtype
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return forward_ad._current_level < 0 and all(type(tensor) in (torch.Tensor, FakeTensor) for tensor in given)


def _upper_triangle(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """What a causal mask hides."""
    sizes = query.shape[-2], key.shape[-2]
    return torch.ones(sizes, dtype=torch.bool, device=query.device).triu(1)


@torch.library.custom_op("fxreuse::map_in_workspace", mutates_args=())
def _map_in_workspace(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    safe: bool,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """As `attention_map`, on a CPU, into storage from the pool. The work is done in place, in three passes."""
    shape = _shape(query, key, mask)
    found = _lend(shape, dtype or query.dtype)
    if found.numel() == 0:
        return found
    queries, keys, width = *shape[-2:], query.shape[-1]
    flat = found.view(-1, queries, keys)
    left = (query * scale).expand(*shape[:-2], queries, width).reshape(-1, queries, width)
    right = key.expand(*shape[:-2], keys, width).reshape(-1, keys, width).transpose(1, 2)
    bias = _bias(query, key, mask, is_causal)
    if found.dtype == query.dtype:
        if bias is not None:
            found.copy_(bias)
        _softmax_of_product(flat, left, right, biased=bias is not None)
    else:
        step = scores_at_a_time(queries * keys * query.element_size())
        scores = _lend(torch.Size([min(step, len(flat)), queries, keys]), query.dtype)
        added = None if bias is None else bias.expand(shape)
        indices = list(itertools.product(*map(range, shape[:-2])))
        for start in range(0, len(flat), step):
            part = slice(start, min(start + step, len(flat)))
            scores = scores[: part.stop - start]
            if added is not None:
                torch.stack([added[index] for index in indices[part]], out=scores)
            _softmax_of_product(scores, left[part], right[part], biased=added is not None)
            flat[part].copy_(scores)
    if safe and bias is not None and flat[..., 0].isnan().any():
        found.masked_fill_((bias == -math.inf).all(-1, keepdim=True), 0)
    return found


def scores_at_a_time(size: int) -> int:
    """Of how many matrices of scores, of ``size`` bytes each, a part is made where a map has another dtype."""
    return max(1, _CHUNK // size)


def _softmax_of_product(scores: torch.Tensor, left: torch.Tensor, right: torch.Tensor, biased: bool) -> None:
    scores.baddbmm_(left, right, beta=int(biased))
    torch.softmax(scores, -1, out=scores)


def _lend(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    count = shape.numel()
    if count * dtype.itemsize < SMALLEST:
        return torch.empty(shape, dtype=dtype)
    return _POOL.lend(count, dtype).view(shape)


def _shape(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Size:
    outer = query.shape[:-2]
    if mask is not None or key.shape[:-2] != outer:
        outer = torch.broadcast_shapes(outer, key.shape[:-2], () if mask is None else mask.shape[:-2])
    return torch.Size([*outer, query.shape[-2], key.shape[-2]])


def _bias(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor | None:
    """All masking as one addend."""
    bias = mask
    if mask is not None and mask.dtype == torch.bool:
        bias = query.new_zeros(mask.shape).masked_fill_(~mask, -math.inf)
    if is_causal:
        causal = query.new_zeros((query.shape[-2], key.shape[-2])).masked_fill_(_upper_triangle(query, key), -math.inf)
        bias = causal if bias is None else bias + causal
    return bias


@_map_in_workspace.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    safe: bool,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    return query.new_empty(_shape(query, key, mask), dtype=dtype or query.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    query, key, mask, _, ctx.scale, _, _ = inputs
    ctx.save_for_backward(query, key, mask, output)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    query, key, mask, found = ctx.saved_tensors
    found, gradient = found.to(query.dtype), gradient.to(query.dtype)
    scores = found * (gradient - (gradient * found).sum(-1, keepdim=True))
    of_query = (scores @ key * ctx.scale).sum_to_size(query.shape)
    of_key = (scores.transpose(-2, -1) @ query * ctx.scale).sum_to_size(key.shape)
    of_mask = scores.sum_to_size(mask.shape) if mask is not None and mask.is_floating_point() else None
    return of_query, of_key, of_mask, None, None, None, None


_map_in_workspace.register_autograd(_backward, setup_context=_save)


@_map_in_workspace.register_vmap
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    *options: Any,
) -> tuple[torch.Tensor, int]:
    """The mapped axis becomes the outermost of those that broadcast."""
    given = [(tensor, dim) for tensor, dim in zip((query, key, mask), in_dims, strict=False) if tensor is not None]
    rank = max(tensor.dim() + (dim is None) for tensor, dim in given)
    query, key, *rest = (_outermost(tensor, dim, rank) for tensor, dim in given)
    return torch.ops.fxreuse.map_in_workspace(query, key, rest[0] if rest else None, *options), 0


def _outermost(tensor: torch.Tensor, dim: int | None, rank: int) -> torch.Tensor:
    """With axis ``dim`` (None: one of size 1) in front, and further ones of size 1 after it up to the rank."""
    tensor = tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
    return tensor.reshape(tensor.shape[0], *[1] * (rank - tensor.dim()), *tensor.shape[1:])
