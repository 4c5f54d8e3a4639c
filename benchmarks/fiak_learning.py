"""What pruning by learned priors costs and gains in quality, on data that is at hand.

    python benchmarks/fiak_learning.py                 # everything that benchmarks/results/ does not have yet
    python benchmarks/fiak_learning.py digits --seeds=8
    python benchmarks/tables.py                        # writes the tables in docs/fiak.md

Handwritten digits as a small ViT, and characters of Python's help texts (examples/fiak_vit.py). For every seed a dense
model, one with π_ij (FiAKformer) and one with π_j (GMMformer) are trained; every row of the table is one of these,
pruned or not, after the same number of further steps, so that pruned models are not trained longer than dense ones.
One thread.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import fxreuse

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "fiak_learning.json"
sys.path.insert(0, str(ROOT.parent / "examples"))

from fiak_vit import Characters, Digits, fit  # noqa: E402


class Row(NamedTuple):
    """A row of the table: which model, and how much of it is pruned."""

    name: str
    plan: str | None
    scores: float = 0.0
    keys: float = 0.0
    pruned: bool = False


DENSE = Row("dense baseline", None)
FIAK = Row("FiAKformer, dense", "fiak")
GMM = Row("GMMformer, dense", "fiak prior=mixture")
GMM_KEYS = Row("GMMformer, keys 30 %", GMM.plan, keys=0.3, pruned=True)
ROWS = {
    "digits": [
        DENSE,
        GMM,
        GMM_KEYS,
        FIAK,
        *(Row(f"FiAK, scores {k:.0%}".replace("%", " %"), "fiak", k, pruned=True) for k in (0.5, 0.6, 0.7)),
        *(Row(f"FiAK, mixed 70 % / {k:.0%}".replace("%", " %"), "fiak", 0.7, k, True) for k in (0.15, 0.2)),
        Row("FiAK, keys 30 %", "fiak", keys=0.3, pruned=True),
    ],
    "characters": [
        DENSE,
        GMM,
        GMM_KEYS,
        FIAK,
        *(Row(f"FiAK, scores {k:.0%}".replace("%", " %"), "fiak", k, pruned=True) for k in (0.4, 0.5)),
        Row("FiAK, mixed 40 % / 10 %", "fiak", 0.4, 0.1, True),
        Row("FiAK, keys 30 %", "fiak", keys=0.3, pruned=True),
    ],
}
STEPS = {"digits": (1600, 400), "characters": (700, 200)}


def run(data: Digits | Characters, seed: int, found: dict[str, dict[str, float]]) -> None:
    """Fill in the rows of a seed that are missing."""
    first, second = STEPS[data.name]
    trained: dict[str | None, nn.Module] = {}
    for row in ROWS[data.name]:
        cells = found.setdefault(f"{data.name}: {row.name}", {})
        if str(seed) in cells:
            continue
        if row.plan not in trained:
            torch.manual_seed(seed)
            model = data.model()
            if row.plan is not None:
                model = fxreuse.apply(model, row.plan, data.example)
            trained[row.plan] = fit(model, data, first, seed)
        model = copy.deepcopy(trained[row.plan])
        if row.pruned:
            model = fxreuse.prune(model, scores=row.scores, keys=row.keys)
        cells[str(seed)] = data.evaluate(fit(model, data, second, 1000 + seed, rate=1e-3))
        print(f"{data.name}, seed {seed}, {row.name}: {cells[str(seed)]:.3f} ({time.process_time():.0f} s)", flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")


def main() -> None:
    torch.set_num_threads(1)
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    seeds = next((int(word.partition("=")[2]) for word in sys.argv if word.startswith("--seeds=")), 5)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for make in (Digits, Characters):
        if not words or make.name in words:
            data = make()
            found[f"{data.name}: settings"] = {"first steps": STEPS[data.name][0], "further steps": STEPS[data.name][1]}
            if isinstance(data, Characters):
                found[f"{data.name}: settings"]["bigram entropy"] = data.bigram_entropy
            for seed in range(seeds):
                run(data, seed, found)


if __name__ == "__main__":
    main()
