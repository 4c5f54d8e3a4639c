"""``lowering=auto`` of a residual pass: which lowering a matrix gets, from its device and the example's sizes."""

from __future__ import annotations

import torch

from fxreuse.cost_model.device import Device
from fxreuse.cost_model.residual_time import ResidualMatrix
from fxreuse.errors import InputError, UnsupportedError
from fxreuse.layouts.projections import Projection, hints

from .meant_for import intended

# An accelerator that the cost model has no figures for counts as this one.
_LIKE_MANY = "A100"


def choose_lowering(projection: Projection, rank: int, diagonal: bool) -> tuple[str, str]:
    """The lowering that the cost model predicts to take less time at the example's sizes, and the reason.

    The factored form does more for every token, and the merged one writes a matrix at each call, however many tokens
    there are (`cost_model.residual_time`). On a CPU the prediction is for this machine where it has been measured, and
    otherwise for a typical one.

    Arguments:
        projection: the projection before the residual is added.
        rank: the rank of its residual.
        diagonal: whether there is a diagonal.
    """
    value = projection.source.meta["val"]
    shape = hints(value)
    inputs, outputs = len(projection.columns), len(projection.rows)
    tokens = torch.Size(shape).numel() // max(shape[projection.input_feature], 1)
    device = intended() or _device(value.device)
    dtype = value.dtype if str(value.dtype).removeprefix("torch.") in device.dtypes else torch.float32
    matrix = ResidualMatrix(tokens, inputs, outputs, rank, diagonal, dtype)
    factored, merged = matrix.factored(device), matrix.merged(device)
    chosen = "factored" if factored <= merged else "merged"
    return chosen, (
        f"for {tokens:,} tokens of the example, {1e6 * factored:,.0f} µs more factored and {1e6 * merged:,.0f} µs more "
        f"merged, predicted for {device.name}"
    )


def _device(device: torch.device) -> Device:
    if device.type in ("cpu", "meta"):
        return Device.typical_cpu()
    try:
        return Device.of(device)
    except (InputError, UnsupportedError):
        return Device.preset(_LIKE_MANY)
