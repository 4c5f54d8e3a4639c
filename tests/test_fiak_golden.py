"""FiAK's figures for DeiT-tiny, N = 197: what pruning saves of the multiply-accumulates of the blocks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import fxreuse
from fxreuse.cost_model import summarise
from fxreuse.frontend.load import load_program
from fxreuse.priors.pruning import unskipped_macs

WIDTH, LENGTH, LAYERS = 192, 197, 2
BLOCK = 12 * LENGTH * WIDTH**2 + 2 * LENGTH**2 * WIDTH


@pytest.fixture(scope="module")
def weighed():
    path = Path(__file__).parents[1] / "examples" / "models" / "deit.py"
    spec = importlib.util.spec_from_file_location("deit", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.device("meta"):
        model = module.DeiT(layers=LAYERS)  # blocks are alike
    pictures = torch.empty(2, 3, 224, 224, device="meta")
    program = load_program(model, pictures)
    return fxreuse.apply(model, "fiak", pictures), summarise(program).at(B=1).macs


def saved(weighed, **fractions) -> tuple[float, list[fxreuse.SitePruning]]:
    """The share of the blocks' work that is not there any more, and what was done with each site."""
    model, dense = weighed
    pruned = fxreuse.prune(model, **fractions)
    sites = fxreuse.describe(pruned).pruned
    executed = summarise(pruned.program).at(B=1).macs
    unskipped = unskipped_macs(sites)
    algorithmic = executed - int(unskipped.xreplace(dict.fromkeys(unskipped.free_symbols, 1)))
    return (dense - algorithmic) / (LAYERS * BLOCK), list(sites)


def test_mixed_pruning(weighed):
    share, sites = saved(weighed, scores=0.7, keys=0.2)
    assert [(site.keys_kept, site.scores_kept) for site in sites] == [(158, 4 * 11673)] * LAYERS
    assert 0.1275 <= share <= 0.1325
    # 39 keys of 197 in two projections, and all but 11,673 of 197² scores in two products
    assert share == pytest.approx((2 * 39 * WIDTH**2 + 2 * WIDTH * (LENGTH**2 - 11673)) / BLOCK, abs=1e-12)


def test_key_pruning(weighed):
    share, sites = saved(weighed, keys=0.3)
    assert share == pytest.approx(0.0865, abs=0.0005)
    assert all(site.skipped_share == 1 for site in sites)


def test_score_pruning_is_not_the_papers_figure(weighed):
    """The paper has 8.50 %; by its own definition it is 10.2 %."""
    share, sites = saved(weighed, scores=0.7)
    assert share == pytest.approx(0.1022, abs=0.0005)
    assert all(site.skipped_share == 0 and site.lowering == "mask" for site in sites)
