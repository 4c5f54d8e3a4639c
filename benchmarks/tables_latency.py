"""The tables of docs/latency.md: predicted speed-ups against measured ones."""

from __future__ import annotations

import statistics
from typing import Any

from table_text import github, load


def latency_prediction() -> str:
    """Every cell: what was measured, what was predicted, and by how much the speed-up was missed."""
    rows = []
    for cell in predicted_cells():
        sizes = f"{cell['sizes']['B']} × {cell['tokens'] or cell['sizes'].get('T', '')}"
        rows.append([
            cell["model"],
            sizes,
            cell["plan"],
            cell["lowering"],
            f"{cell['original_ms']:.0f}",
            f"{cell['predicted_original_ms']:.0f}",
            f"{cell['ms']:.0f}",
            f"{cell['predicted_ms']:.0f}",
            "{:.2f} ({:.2f} to {:.2f})".format(*cell["gain"]),
            f"{cell['predicted_gain']:.2f}",
            f"{cell['predicted_gain'] / cell['gain'][0] - 1:+.1%}",
            f"{cell['macs_ratio']:.2f}",
        ])  # fmt: skip
    headers = ["model", "B × T", "plan", "lowering", "before, ms", "predicted", "after, ms", "predicted"]
    return github(rows, [*headers, "gain", "predicted", "error", "MAC ratio"])


def latency_errors() -> str:
    """How far off the predicted speed-up is, next to those that need no model of time."""
    cells = predicted_cells()
    guesses = {
        "predicted": [cell["predicted_gain"] for cell in cells],
        "always 1×": [1.0 for _ in cells],
        "ratio of MACs": [cell["macs_ratio"] for cell in cells],
    }
    rows = []
    for name, gains in guesses.items():
        errors = [abs(guess / cell["gain"][0] - 1) for guess, cell in zip(gains, cells, strict=True)]
        clear = [(guess, cell["gain"][0]) for guess, cell in zip(gains, cells, strict=True) if far(cell["gain"][0])]
        right = sum((guess > 1) == (gain > 1) for guess, gain in clear)
        rows.append([name, f"{statistics.median(errors):.1%}", f"{max(errors):.1%}", f"{right} of {len(clear)}"])
    table = github(rows, ["speed-up", "median error", "worst", "sign right where the gain exceeds 5 %"])
    off = [abs(cell[f"predicted_{name}"] / cell[name] - 1) for cell in cells for name in ("original_ms", "ms")]
    apart, away = statistics.median(map(half_apart, cells)), statistics.median(off)
    return (
        f"{table}\n\n{len(cells)} cells; absolute latency is off by {away:.1%} (median). The speed-up in "
        f"every other round differs from that in the rounds between by {apart:.1%}."
    )


def half_apart(cell: dict[str, Any]) -> float:
    """By how much the gain in half of the rounds differs from that in the other half: how well it is known."""
    one, other = (min(cell["original_rounds"][half::2]) / min(cell["rounds"][half::2]) for half in (0, 1))
    return abs(one / other - 1)


def latency_errors_by_model() -> str:
    """The same, model by model."""
    cells = predicted_cells()
    rows = []
    for model in dict.fromkeys(cell["model"] for cell in cells):
        own = [cell for cell in cells if cell["model"] == model]
        found = [[abs(guess / cell["gain"][0] - 1) for cell, guess in zip(own, gains, strict=True)] for gains in (
            [cell["predicted_gain"] for cell in own], [1.0 for _ in own], [cell["macs_ratio"] for cell in own],
        )]  # fmt: skip
        off = [cell[f"predicted_{name}"] / cell[name] - 1 for cell in own for name in ("original_ms", "ms")]
        errors = [f"{statistics.median(one):.1%} (worst {max(one):.1%})" for one in found]
        rows.append([model, str(len(own)), *errors, f"{statistics.median(off):+.1%}"])
    headers = ["model", "cells", "predicted", "always 1×", "ratio of MACs", "absolute latency"]
    return github(rows, headers)


def far(gain: float) -> bool:
    """Whether a speed-up, or a loss, is above 5 %."""
    return abs(gain - 1) > 0.05


def predicted_cells() -> list[dict[str, Any]]:
    return [cell for cell in load("latency_prediction")["cells"].values() if "predicted_gain" in cell]


TABLES = {
    "latency prediction": latency_prediction,
    "latency errors": latency_errors,
    "latency errors by model": latency_errors_by_model,
}
