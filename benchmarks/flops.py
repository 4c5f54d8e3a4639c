"""The cost model's MACs against torch's own counter, on every architecture of the coverage table.

``python -m benchmarks.flops`` counts each model at two sizes, as it is and rewritten by both lowerings, once from the
captured graph and once by running it under `torch.utils.flop_counter.FlopCounterMode` with unfused attention: on the
meta device where the model runs there, else on the CPU. What has run is kept; ``--only PATTERN`` runs rows again.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import fxreuse
from fxreuse import map_workspace
from fxreuse.apply import rewrite
from fxreuse.attention import AttentionSites
from fxreuse.cost_model import Summary, summarise
from fxreuse.finding.find import find
from fxreuse.frontend.capture import caches_off
from fxreuse.frontend.inputs import normalise
from fxreuse.frontend.load import load_program
from fxreuse.plans.plan import Plan
from fxreuse.program import Program

from .coverage.check import plan_of
from .coverage.row import Built, Inputs, Row
from .coverage.rows import ROWS, missing
from .coverage.runner import isolated, warm_up
from .coverage.verdict import LOWERINGS

RESULTS = Path(__file__).parent / "results" / "flops.json"
LIMIT = 240
#: The forms of a model; that of the captured graph only where the original has work whose result nobody reads.
FORMS = ("original", "captured", *LOWERINGS)


def main() -> None:
    """Count what is asked for, and write the data as each row ends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flops", description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", help="the rows whose name matches, also where they have run")
    pattern = parser.parse_args().only
    rows = [row for row in ROWS if not pattern or re.search(pattern, f"{row.family}: {row.name}", re.IGNORECASE)]
    data: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    data["torch"] = torch.__version__
    torch.set_num_threads(1)
    warm_up()
    for row in rows:
        if missing(row) or (row.name in data["rows"] and not pattern):
            continue
        begun = time.perf_counter()
        data["rows"][row.name] = isolated(lambda row=row: compare(row), LIMIT)  # type: ignore[misc]
        data["rows"] = {row.name: data["rows"][row.name] for row in ROWS if row.name in data["rows"]}
        RESULTS.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        print(f"{row.name}: {verdict(data['rows'][row.name])} ({time.perf_counter() - begun:.0f} s)", flush=True)


def compare(row: Row) -> dict[str, Any]:
    """The counts of one architecture: for every form of the model, pairs of the graph's and torch's at two inputs."""
    result: dict[str, Any] = {"family": row.family}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            built = row.seeded()
            program = load_program(built.model, built.inputs)
        except Exception as error:
            return result | {"failed": _text(error)}
        _count(result, "original", lambda: (built.model, summarise(program)), built)
        if not _equal(result["original"]):
            _count(result, "captured", lambda: (_Captured(program), summarise(program)), built)
        sites = find(program)
        if not len(sites):
            return result
        for lowering in LOWERINGS:
            _count(result, lowering, lambda lowering=lowering: _rewritten(built, program, sites, row, lowering), built)  # type: ignore[misc]
    return result


class _Captured(torch.nn.Module):
    """The captured graph of a model, called as the model is: without work whose result nobody reads."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.graph = program.module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        return self.graph(*flat)


def _equal(one: Mapping[str, Any]) -> bool:
    return "macs" in one and all(ours == theirs for ours, theirs in one["macs"])


def _rewritten(
    built: Built, program: Program, sites: AttentionSites, row: Row, lowering: str
) -> tuple[torch.nn.Module, Summary]:
    plan = " | ".join(f"{step} lowering={lowering}" for step in plan_of(sites, row.plans).split(" | "))
    small = rewrite(program, sites, Plan.of(plan), built.model)
    return small, summarise(small.program)


def _count(
    result: dict[str, Any], form: str, make: Callable[[], tuple[torch.nn.Module, Summary]], built: Built
) -> None:
    """One form of the model, into the result: pairs of numbers, and where torch counted."""
    try:
        model, summary = make()
        found = [_pair(model, summary, given) for given in (built.inputs, built.other)]
    except (fxreuse.UnsupportedError, fxreuse.PlanError) as refusal:
        result[form] = {"refused": _text(refusal)}
    except Exception as error:
        result[form] = {"failed": _text(error)}
    else:
        result[form] = {"macs": [pair for pair, _ in found], "device": found[0][1]}


def _pair(model: torch.nn.Module, summary: Summary, given: Inputs) -> tuple[tuple[int, int], str]:
    call = normalise(model, given)
    flat = [leaf for leaf in pytree.tree_leaves(tuple(call)) if isinstance(leaf, torch.Tensor)]
    leaves = dict(zip(summary.names.inputs, flat, strict=True))
    counted, device = counted_by_torch(model, call.args, call.kwargs)
    return (summary.at_example({name: tuple(value.shape) for name, value in leaves.items()}).macs, counted), device


def counted_by_torch(model: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[int, str]:
    """What torch counts of a call, in multiply-accumulates, and on which device: meta, or the CPU where need be."""
    try:
        twin = copy.deepcopy(model).to("meta").requires_grad_(False)
        given = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, dict(kwargs)))
        return _counted(twin, *given), "meta"
    except Exception:  # whatever a model does that needs values
        return _counted(copy.deepcopy(model).requires_grad_(False), args, dict(kwargs)), "cpu"


def _counted(model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> int:
    with unfused(), caches_off(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


@contextmanager
def unfused() -> Iterator[None]:
    """Attention by products and a softmax, which torch's counter sees."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    plain = mock.patch.object(map_workspace, "_is_plain_inference", return_value=False)
    try:
        with sdpa_kernel(SDPBackend.MATH), plain:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def verdict(result: Mapping[str, Any]) -> str:
    """A row in one line."""
    if "failed" in result:
        return f"FAILED {result['failed'][:200]}"
    return ", ".join(f"{form} {_verdict(result[form])}" for form in FORMS if form in result)


def _verdict(one: Mapping[str, Any]) -> str:
    if "macs" not in one:
        return str(one.get("failed") or one.get("refused"))[:160]
    return "equal" if _equal(one) else f"DIFFERS {one['macs']}"


def _text(error: Exception) -> str:
    text = re.sub(r"\S*/site-packages/", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:400]}"


if __name__ == "__main__":
    sys.exit(main())
