"""Attention by hand, and finding it in a module that is called with plain tensors."""

from __future__ import annotations

import torch
from torch.export import Dim, ExportedProgram

from fxreuse.attention import AttentionSites
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program
from fxreuse.program import Program


class Attention(torch.nn.Module):
    """Attention by hand; subclasses write the two products in their own way."""

    def __init__(self, heads: int = 2, dim: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (torch.nn.Linear(dim, dim) for _ in range(3))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], self.heads, -1)


def find_in(module: torch.nn.Module, *shapes: tuple[int, ...]) -> tuple[Program, AttentionSites]:
    inputs = tuple(torch.randn(shape) for shape in shapes or ((3, 5, 8),))
    program = exported(module, *inputs) if len(inputs) == 1 else load_program(module.eval(), inputs)
    return program, find(program)


def exported(model: torch.nn.Module, *inputs: torch.Tensor) -> Program:
    """The program of a module of which only the evaluation is looked at: one export is enough, a third of a capture."""
    return load_program(export(model, *inputs))


def export(model: torch.nn.Module, *inputs: torch.Tensor) -> ExportedProgram:
    free = tuple(dict.fromkeys(range(min(x.ndim, 2)), Dim.AUTO) for x in inputs)
    return torch.export.export(model.eval(), inputs, dynamic_shapes=free, strict=False)
