"""Architectures captured once for all that is asked of them: no pass changes the program that it is given.

One process runs all files that import from here; see conftest.py.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from fxreuse.frontend.load import load_program
from fxreuse.program import Program

from .architectures import ARCHITECTURES, SAME_MODEL, Case
from .running import apply_captured, call_original, snapshot


@dataclasses.dataclass(frozen=True)
class Captured:
    """An architecture and its program, with all that there was to see of the model before and after the capture."""

    case: Case
    program: Program
    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]

    @property
    def model(self) -> torch.nn.Module:
        return self.case.model

    def apply(self, plan: str) -> torch.nn.Module:
        return apply_captured(self.model, self.program, plan)


def captured(name: str) -> Captured:
    """An architecture, in evaluation mode. Many tests share it: they change copies only."""
    found = _captured(SAME_MODEL.get(name, name))
    if name not in SAME_MODEL:
        return found
    return dataclasses.replace(found, case=dataclasses.replace(ARCHITECTURES[name](), model=found.model))


@functools.cache
def _captured(name: str) -> Captured:
    case = ARCHITECTURES[name]()
    call_original(case.model, case.inputs)  # what a model sets up at its first call is not for a capture to answer for
    mixed_modes(case)
    before = snapshot(case.model)
    program = load_program(case.model, case.inputs)
    after = snapshot(case.model)
    case.model.eval()
    return Captured(case, program, before, after)


def mixed_modes(case: Case) -> None:
    """The model in training mode but for one layer, so that modes can be told apart."""
    case.model.train()
    case.model.get_submodule(case.layer.format(1)).eval()
