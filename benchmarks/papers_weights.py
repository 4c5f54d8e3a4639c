"""The figures of papers 002 (ResidualTransformer: sizes) and 003 (FiAK: pruned work)."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from fxreuse.cost_model import Summary

from .paper_figure import Figure, Reports


@functools.cache
def transducer() -> Reports:
    """The streaming encoder of ResidualTransformer."""
    from models.transducer import TransducerEncoder

    return Reports(lambda: (TransducerEncoder(), torch.zeros(2, 64, 80)))


@functools.cache
def deit() -> Reports:
    """DeiT-tiny with four heads."""
    from models.deit import DeiT

    return Reports(lambda: (DeiT(), torch.zeros(2, 3, 224, 224)))


#: Plans, and the millions of parameters that the paper prints for them, with the digits that it gives; None where its
#: tables name the model and not the size.
SIZES: tuple[tuple[str, str, float | None, int], ...] = (
    ("K = 1", "", 56.7, 1),
    ("K = 3", "share k=3", 18.9, 1),
    ("K = 6", "share k=6", 9.5, 1),
    ("K = 9", "share k=9", None, 1),
    ("K = 18", "share k=18", None, 1),
    ("K = 3, R = 16", "residual k=3 r=16", 21.6, 1),
    ("K = 6, R = 16", "residual k=6 r=16", 12.2, 1),
    ("K = 9, R = 16", "residual k=9 r=16", 9.0, 1),
    ("K = 18, R = 16", "residual k=18 r=16", None, 1),
    ("K = 3, R = 8", "residual k=3 r=8", None, 1),
    ("K = 3, R = 4", "residual k=3 r=4", None, 1),
    ("K = 3, R = 2", "residual k=3 r=2", None, 1),
    ("K = 3, R = 1", "residual k=3 r=1", None, 1),
    ("K = 3, R = 16, no diagonals", "residual k=3 r=16 diagonal=no", None, 1),
    ("K = 3, the last layer its own", "share 3+3+3+3+3+2+1", 22.0, 1),
    ("four sets over 18 layers", "share 5+4+5+4", 12.6, 1),
)


def layer_params(summary: Summary) -> int:
    """The parameters of the layers' projections, norms not counted, as the paper counts."""
    found = summary.counts.params_by_module.items()
    return sum(count for path, count in found if path.startswith("layers.") and "norm" not in path)


def residual_figures() -> Iterator[Figure]:
    """Paper 002."""
    table = "ResidualTransformer: parameters of the Transformer layers, millions"
    baseline = layer_params(transducer()("share k=3").before)
    for what, plan, published, digits in SIZES:
        ours = layer_params(transducer()(plan).after) if plan else baseline
        note = "the paper cuts off" if what.startswith("K = 3, the last") else ""
        yield Figure(table, what, plan, published, digits, ours, 1e6, note)
    smallest = layer_params(transducer()("residual k=3 r=2").after) / baseline
    yield Figure(
        "ResidualTransformer: its smallest good model, per cent of the baseline",
        "K = 3, R = 2",
        "residual k=3 r=2",
        34.0,
        1,
        smallest,
        0.01,
    )
    added = layer_params(transducer()("residual k=3 r=16").after) - layer_params(transducer()("share k=3").after)
    yield Figure("ResidualTransformer: what residuals add, millions", "R = 16", "residual k=3 r=16", 2.7, 1, added, 1e6)


PRUNED: tuple[tuple[str, str, float | None, str], ...] = (
    (
        "mixed, k₁ = 0.7, k₂ = 0.2",
        "fiak scores=0.7 keys=0.2",
        13.00,
        "13.07 before keys and scores are whole numbers",
    ),
    ("keys, k = 0.3", "fiak keys=0.3", None, ""),
    ("scores, k = 0.7", "fiak scores=0.7", 8.50, "see below"),
)


def pruning_figures() -> Iterator[Figure]:
    """Paper 003: what pruning takes of the work of the blocks."""
    for what, plan, published, note in PRUNED:
        report = deit()(plan)
        whole = sum(macs for layer, macs in report.before.counts.macs_by_layer.items() if layer)
        sizes = report.before.at(B=1)
        dense = int(whole.subs(dict.fromkeys(whole.free_symbols, 1)))
        saved = (sizes.macs - report.after.at(B=1).macs_algorithmic) / dense
        table = "FiAK: work of DeiT-tiny's blocks that pruning takes away, per cent"
        yield Figure(table, what, plan, published, 2, saved, 0.01, note)
