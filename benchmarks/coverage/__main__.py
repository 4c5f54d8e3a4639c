"""The command line of the coverage benchmark."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from . import scaling
from .page import PAGE, render
from .row import Row
from .rows import ROWS, missing
from .runner import isolated, run, warm_up
from .verdict import problems, summary, unreached

RESULTS = Path(__file__).parent.parent / "results" / "coverage.json"


def main() -> int:
    """Run what is asked for, and write the data as each row ends. Returns 1 where anything is wrong, and else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", help="run the rows whose name matches, also where they have run")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--list", action="store_true", help="list the rows")
    arguments = parser.parse_args()
    rows = [
        row
        for row in ROWS
        if not arguments.only or re.search(arguments.only, f"{row.family}: {row.name}", re.IGNORECASE)
    ]
    if arguments.list:
        print("\n".join(f"{row.family:16} {row.name:48} {row.expected:3}  {row.source}" for row in rows))
        return 0
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    data = {"rows": {}} if arguments.fresh or not RESULTS.exists() else json.loads(RESULTS.read_text())
    data.update(torch=torch.__version__, transformers=transformers.__version__, others=_versions())
    again = arguments.only is not None
    warm_up()
    for index, row in enumerate(rows):
        if row.name in data["rows"] and not again:
            continue
        print(f"[{index + 1}/{len(rows)}] {row.name}: ", end="", flush=True)
        if missing(row):
            print(f"skipped, {missing(row)} is not installed", flush=True)
            continue
        begun = time.perf_counter()
        data["rows"][row.name] = run(row)
        _write(data)
        print(f"{_brief(row, data['rows'][row.name])} ({time.perf_counter() - begun:.1f} s)", flush=True)
    if not again:
        _scale(data)
    _write(data)
    PAGE.write_text(render(data))
    numbers = summary(data["rows"])
    print(
        f"{numbers['correct']} of {numbers['rows']} rows are right, {numbers['rewritten']} rewritten by both lowerings"
    )
    wrong = [f"WRONG {name}: {problem}" for name, row in data["rows"].items() for problem in problems(row)]
    wrong += [f"WRONG the whole: {problem}" for problem in (() if again else unreached(data))]
    print("\n".join(wrong))
    return 1 if wrong else 0


def _versions() -> dict[str, str]:
    names = ("x-transformers",)
    return {name: metadata.version(name) for name in names if importlib.util.find_spec(name.replace("-", "_"))}


def _scale(data: dict[str, Any]) -> None:
    """Recognition by depth, as far as it is not in the data yet."""
    measured = data.setdefault("scaling", {})
    for model in scaling.MODELS:
        if model not in measured:
            print(f"recognition of {model} by depth", flush=True)
            measured[model] = [isolated(partial(scaling.measure, model, layers)) for layers in scaling.LAYERS]
            _write(data)


def _brief(row: Row, result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"FAILED {result['failed'][:300]}"
    if "refused" in result:
        return f"refused: {result['refused'][:300]}"
    parts = [f"{result['found']}/{row.expected} found"]
    if not result["parts_match"]:
        parts.append(f"stacks {result['stacks']}")
    for step in ("identity", "materialize", "recompute"):
        one = result.get(step)
        if one is not None:
            text = one.get("refused") or one.get("failed") or one.get("faults") or f"{one['error']:.0e}"
            parts.append(f"{step} {text}")
    if len(result["rejected"]) != result["rejected_expected"]:
        parts.append(
            f"rejected {len(result['rejected'])}, expected {result['rejected_expected']}: {result['rejected'][:2]}"
        )
    return ", ".join(parts)


def _write(data: dict[str, Any]) -> None:
    data["rows"] = {row.name: {**data["rows"][row.name], **row.known} for row in ROWS if row.name in data["rows"]}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
