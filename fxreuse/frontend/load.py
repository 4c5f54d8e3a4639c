"""From a model to a normalised program: capture, normalise, and the last checks that need both."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram

from ..passes.normalise import normalise
from ..program import Program
from .capture import caches_off, capture, eval_mode
from .example_sizes import Place
from .inputs import normalise as normalise_inputs
from .untouched import collector_paused, untouched
from .waive import waive_single_values


def load_program(
    model: torch.nn.Module | ExportedProgram, example_inputs: Any = None, only_free: frozenset[Place] | None = None
) -> Program:
    """Capture a model and normalise it. See `fxreuse.frontend.capture.capture`."""
    with collector_paused():
        program = normalise(capture(model, example_inputs, only_free))
    if isinstance(model, ExportedProgram):
        return program
    with untouched(model), eval_mode(model), caches_off(model):
        return waive_single_values(program, model, normalise_inputs(model, example_inputs))
