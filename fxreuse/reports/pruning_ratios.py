"""How much work and memory pruning by priors leaves, against the length: attention alone, and the whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from ..errors import InputError
from .cost_plot import check_picture, pyplot

if TYPE_CHECKING:
    from .cost_report import CostReport

_PANELS = {
    "attention_macs": "MACs, attention alone",
    "model_macs": "MACs, whole model",
    "attention_bytes": "memory, attention alone",
    "model_bytes": "memory, whole model",
}


@dataclasses.dataclass(frozen=True)
class Ratios:
    """What is left of a model after pruning, 1 for all of it.

    Attention alone is the layers' parts around their maps, projections included. Its memory is a layer's map, queries,
    keys, values and contexts; the memory of the whole model is its weights and its peak of activations, a layer's map
    among them, be it written out or not.
    """

    attention_macs: float
    model_macs: float
    attention_bytes: float
    model_bytes: float


@dataclasses.dataclass(frozen=True)
class PruningRatios:
    """At one length: the ratios of the ``algorithm``, without any pruned score, and of what is ``executed``."""

    length: int
    algorithm: Ratios
    executed: Ratios


def pruning_ratios(report: CostReport) -> PruningRatios:
    """The ratios of a report on a fiak plan, at the first of its sizes.

    Raises:
        InputError: the plan prunes nothing.

    >>> import torch, fxreuse
    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    >>> found = pruning_ratios(fxreuse.report(model, "fiak keys=0.5", torch.randn(1, 40, 16)))
    >>> found.algorithm.attention_macs  # the four projections, two of half the keys, and half the products
    0.6111111111111112
    """
    if report.record is None or not report.record.pruned:
        raise InputError(
            "pruning_ratios: expected a report on a fiak plan that prunes, such as 'fiak scores=0.7', found "
            f"{report.plan or 'no plan'}."
        )
    pruned, sizes = report.record.pruned, report.at[0]
    before, after = report.numbers[0]
    parts = report.breakdown(**sizes)
    attention, left = (_attention(parts[when]) for when in ("before", "after"))
    pairs, computed, kept = (
        mean(counts)
        for counts in zip(*((s.heads * s.queries * s.keys, s.computed, s.scores_kept) for s in pruned), strict=True)
    )
    score = before.map_bytes / len(report.before.counts.maps) / pairs
    dense_rows, rows = (mean(counts) for counts in zip(*(_rows(report, site.site) for site in pruned), strict=True))
    held = 0 if any(not site.fused for site in report.sites) else score
    whole = before.weight_bytes + before.peak_bytes + held * pairs
    rest = after.weight_bytes + after.peak_bytes + held * computed

    def ratios(extra: int, scores: float) -> Ratios:
        return Ratios(
            (left - extra) / attention,
            (after.macs - extra) / before.macs,
            (rows + scores) / (dense_rows + pairs),
            (rest - score * (computed - scores)) / whole,
        )

    return PruningRatios(pruned[0].queries, ratios(after.macs - after.macs_algorithmic, kept), ratios(0, computed))


def _attention(parts: Sequence[object]) -> int:
    """The multiply-accumulates of the parts around maps."""
    return sum(part.macs for part in parts if part.name.endswith("attention"))  # type: ignore[attr-defined]


def _rows(report: CostReport, name: str) -> tuple[int, int]:
    """The numbers in a layer's queries, keys, values and contexts, before and after."""
    assert report.record is not None
    site = next(site for site in report.sites if str(site) == name)
    done = next(site for site in report.record.pruned if site.site == name)
    both = site.head_dim + site.value_dim
    queries = site.heads * done.queries * both
    return queries + site.kv_heads * done.keys * both, queries + site.kv_heads * done.keys_kept * both


def draw_pruning_ratios(found: Mapping[str, Sequence[PruningRatios]], path: str | Path) -> None:
    """Draw ratios against the length into a PNG or SVG file: the paper's figure 2.

    Arguments:
        found: the ratios of every scheme, by its name, over lengths.
        path: where to. What the algorithm leaves is drawn in full, what is executed in dashes.

    Raises:
        UnsupportedError: matplotlib is not installed.
        InputError: for a file that is no picture.
    """
    path = Path(path)
    check_picture(path)
    plots = pyplot()
    figure, axes = plots.subplots(1, len(_PANELS), figsize=(4.2 * len(_PANELS), 3.6), sharey=True, layout="constrained")
    for (field, title), axis in zip(_PANELS.items(), axes, strict=True):
        for color, (name, ratios) in enumerate(found.items()):
            lengths = [each.length for each in ratios]
            for which, style in (("algorithm", "-"), ("executed", "--")):
                values = [getattr(getattr(each, which), field) for each in ratios]
                label = name if which == "algorithm" else None
                axis.plot(lengths, values, style, color=f"C{color}", marker="." if label else None, label=label)
        axis.set_title(title)
        axis.set_xlabel("length N")
        axis.set_ylim(0, 1.05)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("pruned / dense")
    axes[0].legend(
        loc="lower left", title="of the algorithm; dashed: executed", fontsize="small", title_fontsize="small"
    )
    figure.savefig(path, dpi=150)
    plots.close(figure)
