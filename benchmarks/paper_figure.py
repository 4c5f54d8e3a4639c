"""What the figures of the papers are made of: a figure next to the published one, and reports of one model."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fxreuse
from fxreuse.reports.cost_report import CostReport

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))


@dataclasses.dataclass(frozen=True)
class Figure:
    """One figure: the published one with as many digits as the paper gives, in units of ``scale``, and ours.

    ``published`` is None where the paper has the model and not the figure.
    """

    table: str
    what: str
    plan: str
    published: float | None
    digits: int
    ours: int | float
    scale: float = 1.0
    note: str = ""

    @property
    def agrees(self) -> bool:
        """Whether ours, rounded as the paper rounds, is the published one, if there is one."""
        if self.published is None:
            return True
        return round(self.ours / self.scale, self.digits) == round(self.published, self.digits)


class Reports:
    """Reports of one model, which is captured once."""

    def __init__(self, make: Callable[[], tuple[torch.nn.Module, Any]]) -> None:
        with torch.device("meta"):
            self._model, self._inputs = make()
        self._model.eval()
        self._module = importlib.import_module("fxreuse.report")
        self._program = self._module.load_program(self._model, self._inputs)
        self._found: dict[str, CostReport] = {}

    def __call__(self, plan: str) -> CostReport:
        """The report of a plan."""
        if plan not in self._found:
            with mock.patch.object(self._module, "load_program", return_value=self._program):
                self._found[plan] = fxreuse.report(self._model, plan, self._inputs)
        return self._found[plan]
