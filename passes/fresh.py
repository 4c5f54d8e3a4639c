"""New rows for projections that become wider."""

from __future__ import annotations

import torch

from fxreuse.layouts.projections import Projection
from fxreuse.program import Program, get_attribute


def fresh(program: Program, projection: Projection, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Random weights (count × inputs) and biases for so many new output features of a projection.

    Those of a `torch.nn.Linear` are drawn as its own initialisation draws them. Of any other module, whose
    initialisation is not known, the weights are drawn from a normal distribution as wide as that of the weights that
    are there, and the biases are zero. Of a model without weights, on the meta device, nothing is drawn: its modules
    initialise what they then have.
    """
    weight = get_attribute(program.module, projection.weight).detach()
    options = {"dtype": weight.dtype, "device": weight.device}
    inputs = weight.shape[projection.inputs]
    owner = projection.weight.rpartition(".")[0]
    if isinstance(program.originals.get(owner), torch.nn.Linear) or weight.device.type == "meta":
        linear = torch.nn.Linear(inputs, count, projection.bias is not None, **options)
        return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    spread = float(weight.float().std()) or inputs**-0.5
    rows = torch.empty(count, inputs, **options).normal_(0.0, spread)
    return rows, None if projection.bias is None else torch.zeros(count, **options)
