"""Predicted against measured speed-ups on this CPU: four models, two plans each, both lowerings, several sizes.

    python benchmarks/latency_prediction.py --prepare    # captures, kept in files
    python benchmarks/latency_prediction.py              # measures this machine, then every cell that has no result yet
    python benchmarks/latency_prediction.py --predict    # predictions, from the device that was measured; no timing
    python benchmarks/tables.py                          # writes the table in docs/latency.md

Names of cases (conformer, hubert …) limit what is done; ``--again`` measures anew. Every cell is one interleaved run,
eager, without gradients; weights are random. The device is measured as `Device.measure` does it, on microbenchmarks
alone; nothing here goes into it.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxreuse
from fxreuse.cost_model import calibrate
from fxreuse.cost_model.latency import predict_latency
from fxreuse.cost_model.summary import summarise
from fxreuse.frontend.load import load_program

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "latency_prediction.json"
PREPARED = Path(tempfile.gettempdir()) / "fxreuse_latency_prediction"
sys.path[:0] = [str(ROOT), str(ROOT.parent / "examples")]

from models.conformer import Conformer  # noqa: E402
from undisturbed import undisturbed  # noqa: E402

LOWERINGS = ("materialize", "recompute")
SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, plans for it, and the sizes at which it is run, each with the inputs that have it."""

    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[..., Any]
    example: dict[str, int]
    sizes: tuple[dict[str, int], ...]
    plans: tuple[str, ...]


def conformer() -> Case:
    sizes = tuple({"B": 1, "T": length} for length in (128, 256, 512, 1024))
    return Case(
        "Conformer-M", Conformer, lambda B, T: (torch.randn(B, T, 256),), {"B": 1, "T": 16}, sizes, ("4x4", "8x2")
    )


def hubert() -> Case:
    import transformers

    def build() -> nn.Module:
        model = transformers.HubertModel(transformers.HubertConfig())
        convolution = model.encoder.pos_conv_embed.conv  # with one weight, as inference wants it; and it can be saved
        nn.utils.parametrize.remove_parametrizations(convolution, "weight")
        convolution._load_state_dict_pre_hooks.clear()
        return model

    sizes = tuple({"B": 1, "input_values_1": 16000 * seconds} for seconds in (2, 5, 10))
    example = {"B": 1, "input_values_1": 16000}
    return Case(
        "HuBERT-base",
        build,
        lambda B, input_values_1: (torch.randn(B, input_values_1),),
        example,
        sizes,
        ("4x3", "2x6"),
    )


def bert() -> Case:
    import transformers

    def build() -> nn.Module:
        return transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)

    sizes = tuple({"B": 1, "T": length} for length in (128, 256, 512))
    return Case(
        "BERT-base",
        build,
        lambda B, T: {"input_ids": torch.randint(5, 1000, (B, T))},
        {"B": 1, "T": 16},
        sizes,
        ("4x3", "2x6"),
    )


def vit(side: int, batches: tuple[int, ...]) -> Case:
    import transformers

    def build() -> nn.Module:
        return transformers.ViTModel(transformers.ViTConfig(image_size=side), add_pooling_layer=False)

    sizes = tuple({"B": batch} for batch in batches)
    return Case(f"ViT-B, {side}²", build, lambda B: (torch.randn(B, 3, side, side),), {"B": 1}, sizes, ("4x3", "2x6"))


CASES: dict[str, Callable[[], Case]] = {
    "conformer": conformer,
    "hubert": hubert,
    "bert": bert,
    "vit224": lambda: vit(224, (1, 4)),
    "vit384": lambda: vit(384, (1,)),
}


def call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def variants(case: Case) -> dict[str, nn.Module]:
    """The model as given, and rewritten by every plan in both lowerings."""
    torch.manual_seed(0)
    models = {"original": case.build().eval()}
    example = case.inputs(**case.example)
    for plan in case.plans:
        for lowering in LOWERINGS:
            wanted = f"{plan} lowering={lowering}"
            models[wanted] = fxreuse.apply(models["original"], wanted, example)
    return models


def prepared(name: str) -> dict[str, nn.Module]:
    PREPARED.mkdir(exist_ok=True)
    path = PREPARED / f"{name}.pt"
    if not path.exists():
        part = path.with_suffix(".part")
        torch.save(variants(CASES[name]()), part)
        part.replace(path)
    return torch.load(path, weights_only=False)


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
        models = models or prepared(name)
        inputs = case.inputs(**sizes)
        run = {kind: functools.partial(call, model, inputs) for kind, model in models.items()}
        timings, dropped = undisturbed(run, seconds=SECONDS)
        for plan in case.plans:
            for lowering in LOWERINGS:
                timing = timings[f"{plan} lowering={lowering}"]
                gain = timing.speedup_over(timings["original"])
                found["cells"][f"{name} {label} {plan} {lowering}"] = {
                    "case": name,
                    "model": case.title,
                    "sizes": sizes,
                    "plan": plan,
                    "lowering": lowering,
                    "original_ms": 1e3 * timings["original"].seconds.median,
                    "ms": 1e3 * timing.seconds.median,
                    "gain": [gain.median, gain.low, gain.high],
                    "rounds": len(timing.rounds),
                    "dropped": dropped,
                }
        print(f"{name} {label}: {1e3 * timings['original'].seconds.median:.1f} ms, {dropped} dropped", flush=True)
        save(found)


def predict(name: str, found: dict[str, Any]) -> None:
    """Fill in what the cost model says of every cell, on the device that was measured."""
    case = CASES[name]()
    cells = [cell for cell in found["cells"].values() if cell["case"] == name]
    if not cells:
        return
    device = calibrate.read_device(found["microbenchmarks"])
    models = variants(case)
    programs = {kind: model.program for kind, model in models.items() if kind != "original"}
    programs["original"] = load_program(models["original"], case.inputs(**case.example))
    summary = {kind: summarise(program) for kind, program in programs.items()}
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
    found["device"] = json.loads(device.to_json())
    save(found)


def load() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"microbenchmarks": {}, "cells": {}}


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
        if again or not found["microbenchmarks"]:
            found["microbenchmarks"] = calibrate.measure_times(print)
            save(found)
        start = time.perf_counter()
        for name in names:
            measure(name, found, again)
            gc.collect()
            print(f"{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
