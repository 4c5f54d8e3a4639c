"""The error of a model that cannot be captured: the line at fault, what stands in the way, and what to try."""

from __future__ import annotations

import linecache
from collections.abc import Sequence

import torch

from ..errors import CaptureError

_VALUES = ("data-dependent", "DataDependent", "Data-dependent")


def capture_error(model: torch.nn.Module, errors: Sequence[tuple[str, Exception]]) -> CaptureError:
    """The error for a model whose export failed in every way, given as (how, what was raised).

    >>> print(capture_error(torch.nn.Linear(2, 2), [("free sizes", ValueError("no"))]))
    Linear cannot be captured as one graph. ValueError: no (tried with free sizes). Next: capture only the part around \
the attentions with target='path.of.the.encoder', or pass other example_inputs.
    """
    _, first = errors[0]
    line = line_at_fault(first)
    depends = any(mark in f"{type(error).__name__} {error}" for _, error in errors for mark in _VALUES)
    reason = "Its Python depends on the values of a tensor, which a graph does not have. " if depends else ""
    ways: dict[str, list[str]] = {}
    for how, error in errors:
        ways.setdefault(first_line(error), []).append(how)
    tried = "; ".join(f"{text} (tried with {', '.join(hows)})" for text, hows in ways.items())
    other = "write that line without them (torch.where, masks)" if depends else "pass other example_inputs"
    found = CaptureError(
        f"{type(model).__name__} cannot be captured as one graph. {f'At {line}. ' if line else ''}{reason}{tried}. "
        f"Next: capture only the part around the attentions with target={_around_layers(model)!r}, or {other}."
    )
    found.__cause__ = first
    return found


def first_line(error: Exception) -> str:
    """The class of an error and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip('.')}" if text else type(error).__name__


def line_at_fault(error: BaseException) -> str:
    """The innermost line of the traceback that is not torch's own, as ``file:line in function: code``."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "/torch/" not in code.co_filename and "/fxreuse/" not in code.co_filename and "<" not in code.co_filename:
            text = linecache.getline(code.co_filename, trace.tb_lineno).strip()
            place = f"{code.co_filename}:{trace.tb_lineno} in {code.co_name}" + (
                f": {text.rstrip(':')}" if text else ""
            )
        trace = trace.tb_next
    return place


def _around_layers(model: torch.nn.Module) -> str:
    """The path of the first submodule that has a list of layers; a placeholder where there is none."""
    for path, module in model.named_modules():
        lists = (child for child in module.children() if isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential)))
        if path and not isinstance(module, torch.nn.ModuleList) and any(len(layers) > 1 for layers in lists):
            return path
    return "path.of.the.encoder"
