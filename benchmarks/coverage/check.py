"""Run one row: capture, find, rewrite in both lowerings, and compare with eager references. The result is data."""

from __future__ import annotations

import contextlib
import copy
import re
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree

import fxreuse
from fxreuse.attention import AttentionSites
from fxreuse.checking.numerics import Difference, KeepFloat64, difference
from fxreuse.checking.reference import MapSharing, site_key
from fxreuse.finding.find import find
from fxreuse.frontend.capture import caches_off
from fxreuse.frontend.inputs import normalise
from fxreuse.frontend.load import load_program
from fxreuse.program import Program, input_sizes

from .row import Built, Inputs, Row
from .verdict import LOWERINGS

# Where packages and this project lie on a machine.
_FOLDERS = re.compile(rf"(/\S*/site-packages|{re.escape(str(Path(__file__).parents[2]))})/")


def check(row: Row) -> dict[str, Any]:
    """Everything that is measured of a row. A step that fails ends it, with what happened under ``failed``."""
    result: dict[str, Any] = row.known
    clock = _Clock()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _fill(result, row, clock)
        except (fxreuse.UnsupportedError, fxreuse.CaptureError) as refusal:
            result["refused"] = _text(refusal)
        except Exception as error:
            result["failed"] = _crash(error)
    result["seconds"] = clock.laps
    return result


def _fill(result: dict[str, Any], row: Row, clock: _Clock) -> None:
    built = row.seeded()
    clock.lap("build")
    program, how = _captured(built)
    clock.lap("capture")
    sites = find(program)
    clock.lap("find")
    result["capture"] = how
    result["free"] = list(input_sizes(program).values())
    result["found"] = len(sites)
    result["stacks"] = {name: len(members) for name, members in sites.stacks.items()}
    result["parts_match"] = row.whole or sorted(result["stacks"].values()) == sorted(row.sites.values())
    result["rejected"] = [f"{one.path}: {one.reason}" for one in sites.rejected]
    if not row.expected:
        return
    if not len(sites):
        _apply(built, program, "2x*")  # which says why there is nothing to rewrite
    plan = plan_of(sites, row.plans)
    result["plan"] = plan
    same = _apply(built, program, identity_plan(sites))
    result["identity"] = _identity(built, same)
    clock.lap("identity")
    for lowering in LOWERINGS:
        result[lowering] = _reused(built, program, plan, lowering)
        clock.lap(lowering)


class _Clock:
    """CPU seconds of each step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.process_time()

    def lap(self, name: str) -> None:
        """The step that ends now."""
        now = time.process_time()
        self.laps[name] = round(now - self._last, 3)
        self._last = now


def plan_of(sites: AttentionSites, groups: Mapping[str, str]) -> str:
    """A plan that shares in pairs in every stack, or in the groups that are given by a piece of its name."""
    if all(len(members) < 2 for members in sites.stacks.values()):
        return "2x*"
    steps = []
    for name, members in sites.stacks.items():
        given = [plan for piece, plan in groups.items() if piece in name]
        chosen = given[0] if given else "2x*" if len(members) > 1 else "1x*"
        steps.append(f"{chosen} stack={name}")
    return " | ".join(steps)


def identity_plan(sites: AttentionSites) -> str:
    """The plan under which every layer keeps its own map."""
    return " | ".join(f"1x* stack={name}" for name in sites.stacks)


def _captured(built: Built) -> tuple[Program, str]:
    """The normalised program, and the way of exporting that worked."""
    module = sys.modules["fxreuse.frontend.capture"]
    ways: list[str] = []

    def export(*args: Any, **kwargs: Any) -> Any:
        exported, how = original(*args, **kwargs)
        ways.append(how)
        return exported, how

    original = module.export  # type: ignore[attr-defined]
    with mock.patch.object(module, "export", export):
        program = load_program(built.model, built.inputs)
    return program, ways[0]


def _apply(built: Built, program: Program, plan: str) -> torch.nn.Module:
    """`fxreuse.apply` on a model whose capture is at hand."""
    with mock.patch.object(sys.modules["fxreuse.apply"], "load_program", return_value=program):
        return fxreuse.apply(built.model, plan, built.inputs)


def _identity(built: Built, same: torch.nn.Module) -> dict[str, Any]:
    """The model rewritten with every map kept: as it is, and in float64, on both inputs."""
    with torch.no_grad(), caches_off(built.model):
        found = [difference(_call(built.model, given), _call(same, given)) for given in (built.inputs, built.other)]
    single = found[0].merged(found[1])
    return {"error_float32": single.error, **_exactness(built, same)}


def _reused(built: Built, program: Program, plan: str, lowering: str) -> dict[str, Any]:
    """One lowering of the plan: its error against eager sharing, or the reason for which it was refused."""
    options = " | ".join(f"{step} lowering={lowering}" for step in plan.split(" | "))
    try:
        small = _apply(built, program, options)
    except (fxreuse.UnsupportedError, fxreuse.PlanError) as refusal:
        return {"refused": _text(refusal)}
    except Exception as error:
        return {"failed": _crash(error)}
    try:
        return _exactness(built, small)
    except Exception as error:
        return {"failed": _crash(error)}


def _exactness(built: Built, rewritten: torch.nn.Module) -> dict[str, Any]:
    """The largest error in float64 against the original run eagerly with the maps shared as the record says."""
    record = fxreuse.describe(rewritten)
    shared = [decision for decision in record.decisions if decision.action == "follow"]
    followers = {site_key(decision.site): site_key(str(decision.leader)) for decision in shared}
    reference = built.reference if followers and built.reference is not None else built.model
    original, small = (copy.deepcopy(module).double() for module in (reference, rewritten))
    found = []
    with torch.no_grad(), KeepFloat64(), caches_off(original):
        for given in (built.inputs, built.other):
            wide = _double(given)
            with MapSharing(original, followers) if followers else contextlib.nullcontext():
                expected = _call(original, wide)
            found.append(_compared(expected, small, wide, given is built.inputs))
    total = found[0].merged(found[1])
    result: dict[str, Any] = {"error": total.error, "tensors": total.compared, "followers": len(followers)}
    return {**result, "faults": list(total.faults)} if total.faults else result


def _compared(expected: Any, small: torch.nn.Module, given: Inputs, captured: bool) -> Difference:
    """The difference on one input; what was not captured may not be refused either, since other sizes are free."""
    try:
        return difference(expected, _call(small, given))
    except fxreuse.FxReuseError as refusal:
        return Difference(float("inf"), "", 0, (f"{'captured' if captured else 'other'} inputs refused: {refusal}",))


def _call(model: torch.nn.Module, inputs: Inputs) -> Any:
    call = normalise(model, inputs)
    return model(*call.args, **call.kwargs)


def _double(inputs: Inputs) -> Inputs:
    def widen(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    return pytree.tree_map_only(torch.Tensor, widen, inputs)


def _crash(error: Exception) -> str:
    """An error that should not be, with the innermost line that it came from."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{_text(error)} ({Path(last.filename).name}:{last.lineno} in {last.name})"


def _text(error: Exception) -> str:
    """What an error says, with files as they are named on every machine."""
    text = _FOLDERS.sub("", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:600]}"
