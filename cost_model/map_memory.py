"""What the storing of an attention map allocates beside the map, step by step: see `fxreuse.map_workspace`.

First the query is scaled, and query and key are laid out as batches of matrices where they are none. Then all masking
becomes one addend. Then scores are computed: in the map's own place, or, where it has another dtype, part by part.
"""

from __future__ import annotations

from typing import Any

import torch

from ..map_workspace import scores_at_a_time


def before_scores(args: tuple[Any, ...], result: torch.Tensor) -> int:
    """The most bytes beside the map before scores are computed.

    Arguments:
        args: those of ``fxreuse::map_in_workspace``.
        result: the map.
    """
    query, _, mask, is_causal = args[:4]
    copied = _copied(query, result.shape[:-2])
    making, _ = _bias(query, mask, is_causal, result.shape[-2:])
    return max(bytes_of(query) + copied, _operands(args, result) + making)


def beside_scores(args: tuple[Any, ...], result: torch.Tensor) -> int:
    """The bytes beside the map and its scores while they are computed."""
    query, _, mask, is_causal = args[:4]
    _, bias = _bias(query, mask, is_causal, result.shape[-2:])
    return _operands(args, result) + bias


def scores_bytes(args: tuple[Any, ...], result: torch.Tensor) -> int:
    """The scores that are computed at a time; none where they are computed in the map's own place."""
    query = args[0]
    if query.dtype == result.dtype or not result.numel():
        return 0
    one = result.shape[-2:].numel() * query.element_size()
    return min(scores_at_a_time(one), result.shape[:-2].numel()) * one


def bytes_of(tensor: torch.Tensor) -> int:
    """The bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def _operands(args: tuple[Any, ...], result: torch.Tensor) -> int:
    """The scaled query, and the key where it is copied, as batches of matrices."""
    query, key = args[:2]
    outer = result.shape[:-2]
    return (_copied(query, outer) or bytes_of(query)) + _copied(key, outer)


def _bias(query: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, sizes: torch.Size) -> tuple[int, int]:
    """All masking as one addend: the most bytes while it is made, and those of the addend.

    A boolean mask is negated, and so is turned into numbers; a causal one is made of two of booleans; both are added.
    """
    addend = mask.numel() * query.element_size() if mask is not None and mask.dtype == torch.bool else 0
    making = addend + mask.numel() if mask is not None and addend else 0
    if not is_causal:
        return making, addend
    causal = sizes.numel() * query.element_size()
    making = max(making, addend + causal + 2 * sizes.numel())
    if mask is None:
        return making, causal
    both = torch.broadcast_shapes(mask.shape, sizes).numel() * query.element_size()
    return max(making, addend + causal + both), both


def _copied(operand: torch.Tensor, outer: torch.Size) -> int:
    """The bytes of an operand as a batch of matrices, where it has to be copied to be one."""
    wanted = operand.expand(*outer, *operand.shape[-2:])
    return 0 if _is_batch(wanted) else bytes_of(wanted)


def _is_batch(tensor: torch.Tensor) -> bool:
    """Whether a tensor (…, rows, columns) is a batch of matrices as it lies in memory."""
    try:
        tensor.view(-1, *tensor.shape[-2:])
    except (RuntimeError, ValueError):
        return False
    return True
