"""Models whose layers are to share weights, captured once; what a rewritten one means, as the original's weights."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxreuse
from fxreuse.program import Program

from .architectures import randomise
from .strategies import Spec, Transformer

apply_module = importlib.import_module("fxreuse.apply")

Captured = tuple[torch.nn.Module, Program, dict[str, torch.Tensor]]

SPECS = {
    "split": Spec(layers=4, heads=2, kv_heads=2, head_dim=4),
    "grouped": Spec(layers=3, heads=2, kv_heads=1, head_dim=4, projection="sizes", rotary=True, bias=False),
    "thirds": Spec(layers=4, heads=2, kv_heads=2, head_dim=4, projection="chunk", norm="post"),
    "interleaved": Spec(layers=3, heads=2, kv_heads=2, head_dim=4, projection="interleaved", rotary=True),
}


class Transposed(torch.nn.Module):
    """A projection whose weight has its inputs first, as GPT-2 has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = torch.nn.Parameter(torch.randn(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


def transposed(spec: Spec) -> Transformer:
    model = Transformer(spec)
    for layer in model.layers:
        layer.attention.qkv = Transposed(spec.width, 3 * spec.width)
        layer.attention.out = Transposed(spec.width, spec.width)
        layer.up, layer.down = Transposed(spec.width, 10), Transposed(10, spec.width)
    return model


@functools.cache
def captured(name: str) -> Captured:
    """A model in float64, its program, and inputs at another size than those of the capture."""
    torch.manual_seed(1)
    spec = SPECS["thirds" if name == "transposed" else name]
    model = (transposed if name == "transposed" else Transformer)(spec).double().eval()
    randomise(model)
    program = apply_module.load_program(model, (torch.randn(2, 5, spec.width, dtype=torch.float64),))
    return model, program, {"x": torch.randn(3, 4, spec.width, dtype=torch.float64)}


NAMES = [*SPECS, "transposed"]


def applied(model: torch.nn.Module, program: Program, plan: str, inputs: Any = None) -> torch.nn.Module:
    """What `fxreuse.apply` makes of a captured model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apply_module, "load_program", lambda *_: program)
        return fxreuse.apply(model, plan, inputs)


def meaning(model: torch.nn.Module, small: torch.nn.Module) -> torch.nn.Module:
    """The original with the weights that the rewritten one works with: U + A B + D, by the paper's equations."""
    twin = copy.deepcopy(model)
    own = dict(small.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name in own and own[name].shape == parameter.shape:
                parameter.copy_(own[name])
        for one in fxreuse.describe(small).matrices:
            shared = small.get_parameter(one.shared).movedim(one.axis, 0)[list(one.shared_rows)].flatten(1)
            made = shared.t().clone()
            if one.residual:
                made += small.get_parameter(one.residual["A"]) @ small.get_parameter(one.residual["B"])
            if "D" in one.residual:
                for i, value in enumerate(small.get_parameter(one.residual["D"])):
                    made[i, i] += value
            assert made.shape == one.shape
            whole = twin.get_parameter(one.weight).movedim(one.axis, 0)
            whole[list(one.rows)] = made.t().reshape(len(one.rows), *whole.shape[1:])
            if one.bias is not None:
                bias = small.get_parameter(one.shared_bias)[list(one.shared_rows)]
                twin.get_parameter(one.bias)[list(one.rows)] = bias
    return twin


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def gradients(module: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
