"""Normalisation: what a captured graph goes through before anything looks at it. Every step is of the exact tier."""

from __future__ import annotations

from collections.abc import Callable

from fxreuse.program import Program

from .clean import clean
from .functional import functionalise, reshape_views
from .inline_regions import inline_regions
from .portable import free_devices, free_dtypes
from .restore_modes import restore_attention_dropout, restore_functional_dropout, restore_modules
from .simplify_masks import simplify_masks
from .split_einsums import split_einsums
from .steps import Pass, run_all

STEPS: tuple[Pass | Callable[[Program], Program], ...] = (
    inline_regions,
    restore_modules,
    restore_functional_dropout,
    restore_attention_dropout,
    reshape_views,
    functionalise,
    split_einsums,
    free_devices,
    free_dtypes,
    clean,
    simplify_masks,
    clean,
)


def normalise(program: Program) -> Program:
    """The program in the form that recognition and rewrites work on. Each step is a function of its own file."""
    program = run_all(STEPS, program)
    program.check()
    return program
