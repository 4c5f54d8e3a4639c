"""What pruning leaves of work and memory, against closed forms, and its picture."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import fxreuse
from fxreuse.reports.pruning_ratios import draw_pruning_ratios, pruning_ratios

LENGTH, DIM, HEADS, LAYERS = 40, 16, 2, 2


@functools.cache
def report(plan: str) -> fxreuse.CostReport:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, batch_first=True)
    model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    return fxreuse.report(model, plan, torch.randn(1, LENGTH, DIM))


def test_scores():
    found = pruning_ratios(report("fiak scores=0.5"))
    projections, products, feed_forward = 4 * LENGTH * DIM**2, 2 * LENGTH**2 * DIM, 4 * LENGTH * DIM**2
    attention = projections + products
    assert found.length == LENGTH
    assert found.algorithm.attention_macs == pytest.approx((projections + products / 2) / attention)
    assert found.algorithm.model_macs == pytest.approx(
        (attention + feed_forward - products / 2) / (attention + feed_forward)
    )
    # half of the map, beside queries, keys, values and contexts
    rows, scores = 4 * LENGTH * DIM, HEADS * LENGTH**2
    assert found.algorithm.attention_bytes == pytest.approx((rows + scores / 2) / (rows + scores))
    assert found.algorithm.model_bytes < 1
    assert found.executed.attention_macs == found.executed.model_macs == found.executed.attention_bytes == 1


def test_keys():
    found = pruning_ratios(report("fiak keys=0.2"))  # 32 are left, which fill vectors as they are
    saved = 8 * (2 * DIM**2 + 2 * LENGTH * DIM)
    attention = 4 * LENGTH * DIM**2 + 2 * LENGTH**2 * DIM
    assert found.algorithm == found.executed
    assert found.executed.attention_macs == pytest.approx(1 - saved / attention)
    rows, scores = 4 * LENGTH * DIM, HEADS * LENGTH**2
    left = rows - 2 * 8 * DIM + HEADS * LENGTH * 32
    assert found.executed.attention_bytes == pytest.approx(left / (rows + scores))


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "ratios.svg"
    draw_pruning_ratios({"scores": [pruning_ratios(report("fiak scores=0.5"))]}, path)
    assert "svg" in path.read_text()[:200]
    with pytest.raises(fxreuse.InputError, match=r"ends in .png or .svg"):
        draw_pruning_ratios({}, tmp_path / "ratios.pdf")


def test_a_report_without_pruning():
    with pytest.raises(fxreuse.InputError, match="expected a report on a fiak plan that prunes"):
        pruning_ratios(report("fiak"))
