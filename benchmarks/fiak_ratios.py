"""What pruning by priors leaves of DeiT-tiny's work and memory, against the length: figure 2 of the paper.

    python benchmarks/fiak_ratios.py  # writes benchmarks/results/fiak_ratios.json and docs/fiak_ratios.svg

Pictures of 8×8 to 40×40 patches; the models are on the meta device, nothing is run.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

import fxreuse
from fxreuse.reports.pruning_ratios import PruningRatios, draw_pruning_ratios, pruning_ratios

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "examples"))

from models.deit import DeiT  # noqa: E402

SIDES = (8, 14, 20, 28, 40)
PLANS = {
    "keys 30 %, by a mixture": "fiak prior=mixture keys=0.3",
    "scores 70 %": "fiak scores=0.7",
    "scores 70 %, keys 20 %": "fiak scores=0.7 keys=0.2",
}


def ratios(side: int, plan: str) -> PruningRatios:
    """Of DeiT-tiny on pictures of ``side`` patches a side, one picture at a time."""
    with torch.device("meta"):
        model = DeiT(size=16 * side)
        pictures = torch.empty(1, 3, 16 * side, 16 * side)
    return pruning_ratios(fxreuse.report(model, plan, pictures))


def main() -> None:
    found = {name: [ratios(side, plan) for side in SIDES] for name, plan in PLANS.items()}
    cells = {name: [dataclasses.asdict(each) for each in several] for name, several in found.items()}
    (ROOT / "results" / "fiak_ratios.json").write_text(json.dumps(cells, indent=2, ensure_ascii=False) + "\n")
    draw_pruning_ratios(found, ROOT.parent / "docs" / "fiak_ratios.svg")


if __name__ == "__main__":
    main()
