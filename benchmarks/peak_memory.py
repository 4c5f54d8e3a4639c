"""Predicted against measured peak memory of four models on this CPU: ``python -m benchmarks.peak_memory``.

Each is measured by torch's profiler in inference, at two lengths, as it is and rewritten by both lowerings. What has
run is kept.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fxreuse
from fxreuse.apply import rewrite
from fxreuse.checking.measure import peak_memory
from fxreuse.cost_model.memory import peak_bytes
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "peak_memory.json"
sys.path.insert(0, str(ROOT / "examples"))

Case = tuple[Callable[[], torch.nn.Module], str, Callable[[int], dict[str, torch.Tensor]], tuple[int, int], str]


def cases() -> dict[str, Case]:
    """By name: the model, what its size means, its inputs at a size, two sizes, and a plan."""
    import transformers
    from models.conformer import Conformer

    return {
        "BERT-base": (
            lambda: transformers.BertModel(transformers.BertConfig()),
            "tokens",
            lambda size: {"input_ids": torch.zeros(1, size, dtype=torch.long)},
            (128, 512),
            "2x6",
        ),
        "HuBERT-base": (
            lambda: transformers.HubertModel(transformers.HubertConfig()),
            "samples",
            lambda size: {"input_values": torch.randn(1, size)},
            (32_000, 160_000),
            "2x6",
        ),
        "ViT-B": (
            lambda: transformers.ViTModel(transformers.ViTConfig()),
            "images",
            lambda size: {"pixel_values": torch.randn(size, 3, 224, 224)},
            (1, 4),
            "2x6",
        ),
        "Conformer-M": (Conformer, "frames", lambda size: {"frames": torch.randn(1, size, 256)}, (256, 1024), "4x4"),
    }


def main() -> None:
    """Measure what is not in the data yet."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, (make, unit, inputs, sizes, plan) in cases().items():
        if name in data:
            continue
        model = make().eval()
        program = load_program(model, inputs(sizes[0]))
        forms = {"original": model}
        for lowering in ("materialize", "recompute"):
            forms[lowering] = rewrite(program, find(program), fxreuse.Plan.of(f"{plan} lowering={lowering}"), model)
        rows = []
        for size in sizes:
            given = inputs(size)
            for form, one in forms.items():
                found = {"size": size, "form": form, "measured": measured(one, given)}
                found["predicted"] = peak_bytes(one, (), given)
                rows.append(found)
                print(name, unit, found, flush=True)
        data[name] = {"unit": unit, "plan": plan, "rows": rows}
        RESULTS.write_text(json.dumps(data, indent=1) + "\n")


def measured(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """The peak of one call."""
    with torch.no_grad():
        return peak_memory(lambda: model(**inputs))


if __name__ == "__main__":
    main()
