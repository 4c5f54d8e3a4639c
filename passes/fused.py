"""The arguments of a fused attention, read once, and its dropout as a module."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import fx

from fxreuse.modules import DropoutProbability
from fxreuse.nodes import argument
from fxreuse.program import Program, module_path
from fxreuse.tree import free_path, place

OPERATOR = torch.ops.aten.scaled_dot_product_attention.default


@dataclasses.dataclass(frozen=True)
class Fused:
    """A call of ``scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)``."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    dropout_p: Any
    is_causal: bool
    scale: float | None
    enable_gqa: bool

    @staticmethod
    def of(node: fx.Node) -> Fused:
        """Read the arguments of a call node, however they were passed."""
        return Fused(
            argument(node, 0, "query"),
            argument(node, 1, "key"),
            argument(node, 2, "value"),
            argument(node, 3, "attn_mask"),
            argument(node, 4, "dropout_p", 0.0),
            argument(node, 5, "is_causal", False),
            argument(node, 6, "scale"),
            argument(node, 7, "enable_gqa", False),
        )

    @property
    def factor(self) -> float:
        """What the scores are multiplied by."""
        return self.scale if self.scale is not None else 1 / math.sqrt(self.query.meta["val"].shape[-1])


def dropout_module(program: Program, site: fx.Node, dropout_p: Any) -> str | None:
    """The path of a Dropout module for the map of a fused attention, made from its ``dropout_p``; None without any."""
    if not isinstance(dropout_p, fx.Node):
        return None
    probability = program.module.get_submodule(str(dropout_p.target))
    assert isinstance(probability, DropoutProbability)
    path = free_path(program.module, module_path(site), "dropout")
    place(program.module, path, torch.nn.Dropout(probability.p).eval())
    return path
