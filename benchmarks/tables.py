"""Write the tables in docs/ from the measurements in benchmarks/results/."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "measurements.md"
LATENCY = ROOT / "docs" / "latency.md"


def identity() -> str:
    found = json.loads((ROOT / "benchmarks" / "results" / "identity.json").read_text())
    rows = []
    for name, row in found.items():
        cells = [name]
        for mode in ("eager", "compiled"):
            one = row[mode]
            cells += [f"{one['original_ms']:.1f}", f"{one['identity_ms']:.1f}"]
            cells += [f"{one['ratio']:.2f} ({one['low']:.2f} to {one['high']:.2f})"]
        rows.append(cells)
    headers = ["model, input", "original, eager", "identity, eager", "original / identity"]
    headers += ["original, compiled", "identity, compiled", "original / identity"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def overhead(kind: str) -> str:
    """One of the tables of overhead.json: ``export``, ``layers`` or ``meta``."""
    found = json.loads((ROOT / "benchmarks" / "results" / "overhead.json").read_text())
    rows = [(name.partition(": ")[2], row) for name, row in found.items() if name.startswith(f"{kind}: ")]
    if kind == "export":
        headers = ["model", "export alone, s", "apply, s", "apply / export"]
        cells = [
            [
                name,
                f"{r['export_s']:.2f}",
                f"{r['apply_s']:.2f}",
                f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})",
            ]
            for name, r in rows
        ]
    else:
        headers = ["model, layers", "sites", "capture, s", "find, ms"]
        cells = [[name, r["sites"], f"{r['capture_s']:.1f}", f"{1e3 * r['find_s']:.0f}"] for name, r in rows]
        if kind == "meta":
            headers = ["model", *headers[1:], "peak memory, GiB"]
            cells = [[*row, f"{r['peak_gib']:.2f}"] for row, (_, r) in zip(cells, rows, strict=True)]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def load(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def github(rows: list[list[str]], headers: list[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def reuse_latency() -> str:
    """Milliseconds, and how many times faster than the original as given and with fused attention."""
    rows = []
    for cell in sorted(load("reuse_latency").values(), key=lambda cell: (cell["case"], cell["length"])):
        row = [cell["model"], cell["plan"], str(cell["length"])]
        row += [f"{cell['ms'][kind]:.0f}" if kind in cell["ms"] else "" for kind in ("given", "fused")]
        for kind in ("materialize", "recompute"):
            gains = [cell[f"over {against}"][kind] for against in ("given", "fused") if f"over {against}" in cell]
            row += [
                f"{cell['ms'][kind]:.0f}",
                " · ".join(f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in gains),
            ]
        rows.append([*row, cell["auto"], str(cell["rounds"])])
    headers = ["model", "plan", "T", "as given", "fused", "materialize", "gain", "recompute", "gain", "auto", "rounds"]
    return github(rows, headers)


def reuse_kernels() -> str:
    found = load("reuse_kernels")
    columns = ["fused", "map, fresh", "map", "leader", "follower", "map, bf16", "follower, bf16"]
    rows = [
        [length, *(f"{row[name]:.1f} ({row[name] / row['fused']:.2f})" for name in columns)]
        for length, row in found.items()
    ]
    return github(rows, ["T", *columns])


def reuse_memory() -> str:
    kinds = ["map", "original"]
    for options in ("recompute", "recompute values=2", "materialize", "materialize values=2"):
        kinds += [options, f"{options}, workspace"]
    rows = [[length, *(f"{row[kind] / 2**20:.0f}" for kind in kinds)] for length, row in load("reuse_memory").items()]
    return github(rows, ["T", *kinds])


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
    return f"{table}\n\n{len(cells)} cells; absolute latency is off by {statistics.median(off):.1%} (median)."


def far(gain: float) -> bool:
    """Whether a speed-up, or a loss, is above 5 %."""
    return abs(gain - 1) > 0.05


def predicted_cells() -> list[dict[str, Any]]:
    return [cell for cell in load("latency_prediction")["cells"].values() if "predicted_gain" in cell]


def write(page: str, name: str, table: str) -> str:
    """The page with the table between its two marks replaced."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"{PAGE.name} has no place for {name}: expected {start} and {end}")
    return pattern.sub(lambda _: f"{start}\n{table}\n{end}", page)


def main() -> None:
    page = PAGE.read_text()
    for make in (identity, reuse_latency, reuse_kernels, reuse_memory):
        page = write(page, make.__name__.replace("_", " "), make())
    if (ROOT / "benchmarks" / "results" / "overhead.json").exists():
        for kind in ("export", "layers", "meta"):
            page = write(page, f"overhead, {kind}", overhead(kind))
    PAGE.write_text(page)
    page = LATENCY.read_text()
    for make in (latency_prediction, latency_errors):
        page = write(page, make.__name__.replace("_", " "), make())
    LATENCY.write_text(page)


if __name__ == "__main__":
    main()
