"""Predicted against measured speed-ups on this CPU: four models, four plans each, both lowerings, several sizes.

    python benchmarks/latency_prediction.py --prepare    # captures, kept in files
    python benchmarks/latency_prediction.py              # measures this machine and then every cell, case by case
    python benchmarks/latency_prediction.py --predict    # predictions, from the device that was measured; no timing
    python benchmarks/tables.py                          # writes the table in docs/latency.md

Names of cases (conformer, hubert …) limit what is done; ``--again`` measures anew. Every cell is one interleaved run,
eager, without gradients; weights are random. Right before the cells of a case the device is measured as
`Device.measure` does it, on microbenchmarks alone; nothing here goes into it. Every time is the shortest of some
rounds, as those of the microbenchmarks are, since a processor that others share runs at several speeds.
`latency_cases.py` has the cases.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Each thread on a core of its own, before OpenMP starts: two that wait for each other on one take ten times as long.
os.environ.setdefault("OMP_PROC_BIND", "true")

import torch
from torch import nn

from fxreuse.cost_model import calibrate
from fxreuse.cost_model.latency import predict_latency
from fxreuse.cost_model.read_times import read_device

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "latency_prediction.json"
sys.path.insert(0, str(ROOT))

from latency_cases import CASES, LOWERINGS, prepared, summaries  # noqa: E402
from undisturbed import undisturbed  # noqa: E402

SECONDS = 45.0
# How much of the processors' time others may take in a round that counts. Two threads that wait for each other lose far
# more than that.
OTHERS = 0.03


def call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def settle_heap() -> None:
    """Let the C library's limits grow to what they are in a process that has been at work for a while."""
    torch.empty(2**25 - 2**13, dtype=torch.uint8)


def measure(name: str, found: dict[str, Any], again: bool) -> None:
    case = CASES[name]()
    models: dict[str, nn.Module] = {}
    for sizes in case.sizes:
        label = ", ".join(f"{size}={value}" for size, value in sizes.items())
        wanted = [f"{name} {label} {plan} {low}" for plan in case.plans for low in LOWERINGS]
        if not again and all(cell in found["cells"] for cell in wanted):
            continue
        if not models:
            models = prepared(name)
            found["microbenchmarks"][name] = calibrate.measure_times(print)
        inputs = case.inputs(**sizes)
        run = {kind: functools.partial(call, model, inputs) for kind, model in models.items()}
        timings, dropped = undisturbed(run, rounds=7, seconds=SECONDS, share=OTHERS, settled=True)
        for plan in case.plans:
            for lowering in LOWERINGS:
                timing, original = timings[f"{plan} lowering={lowering}"], timings["original"]
                gain = timing.speedup_over(original)
                found["cells"][f"{name} {label} {plan} {lowering}"] = {
                    "case": name,
                    "model": case.title,
                    "sizes": sizes,
                    "plan": plan,
                    "lowering": lowering,
                    "original_ms": 1e3 * min(original.rounds),
                    "ms": 1e3 * min(timing.rounds),
                    "gain": [min(original.rounds) / min(timing.rounds), gain.low, gain.high],
                    "original_rounds": [round(1e3 * seconds, 2) for seconds in original.rounds],
                    "rounds": [round(1e3 * seconds, 2) for seconds in timing.rounds],
                    "dropped": dropped,
                }
        print(f"{name} {label}: {1e3 * min(timings['original'].rounds):.1f} ms, {dropped} dropped", flush=True)
        save(found)


def predict(name: str, found: dict[str, Any]) -> None:
    """Fill in what the cost model says of every cell, on the device that was measured."""
    cells = [cell for cell in found["cells"].values() if cell["case"] == name]
    if not cells:
        return
    device = read_device(found["microbenchmarks"][name], calibrate.processor())
    summary = summaries(name)
    for cell in cells:
        kind = f"{cell['plan']} lowering={cell['lowering']}"
        predicted = {one: predict_latency(summary[one], device, cell["sizes"]) for one in ("original", kind)}
        cell["predicted_original_ms"] = 1e3 * predicted["original"].seconds
        cell["predicted_ms"] = 1e3 * predicted[kind].seconds
        cell["predicted_gain"] = predicted["original"].seconds / predicted[kind].seconds
        cell["macs_ratio"] = summary["original"].at(**cell["sizes"]).macs / summary[kind].at(**cell["sizes"]).macs
        cell["tokens"] = predicted["original"].sizes.get("T", 0)
        print(
            f"{kind} {cell['sizes']}: {cell['gain'][0]:.2f} measured, {cell['predicted_gain']:.2f} predicted",
            flush=True,
        )
    found["devices"][name] = json.loads(device.to_json())
    save(found)


def load() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"microbenchmarks": {}, "devices": {}, "cells": {}}


def save(found: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    names = [word for word in sys.argv[1:] if not word.startswith("--")] or list(CASES)
    again = "--again" in sys.argv
    if "--predict" not in sys.argv:
        torch.set_num_threads(2)
    found = load()
    with torch.no_grad():
        if "--prepare" in sys.argv:
            for name in names:
                prepared(name)
                print("prepared", name, flush=True)
                gc.collect()
            return
        if "--predict" in sys.argv:
            for name in names:
                predict(name, found)
            return
        settle_heap()
        start = time.perf_counter()
        for name in names:
            measure(name, found, again)
            gc.collect()
            print(f"{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
