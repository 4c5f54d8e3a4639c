"""Write the tables in docs/ from the measurements in benchmarks/results/."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "measurements.md"
RESIDUAL_PAGE = ROOT / "docs" / "residual.md"


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


def residual_fit() -> str:
    """Errors of the fit by rank, and of the plain decomposition that it starts from."""
    rows = [
        [
            str(row["rank"]),
            f"{row['parameters']:,}",
            f"{row['plain']:.4f}",
            f"{row['fit']:.4f}",
            f"{1 - row['fit'] / row['plain']:.1%}",
            f"{row['outputs']:.3f}",
            f"{row['bits']:.3f}",
        ]
        for row in load("residual_example")["fit"]
    ]
    return github(rows, ["R", "parameters", "plain", "fit", "below plain", "outputs", "bits"])


def residual_training() -> str:
    """Bits for a character before and after training, from different starts."""
    found = load("residual_example")
    rows = [["the original", f"{found['parameters']:,}", "", f"{found['bits']:.3f}"]]
    for row in found["training"]:
        rows.append([row["start"], f"{row['parameters']:,}", f"{row['before']:.3f}", f"{row['after']:.3f}"])
    return github(rows, ["model and start", "parameters", "bits before", f"after {found['steps']} steps"])


def residual_tokens() -> str:
    """Milliseconds of both lowerings and the automatic one, and how many times as fast as the dense model."""
    rows = []
    for cell in sorted(load("residual_latency").values(), key=lambda cell: cell["length"]):
        if (cell["layers"], cell["k"]) == (18, 3):
            times = [_with_gain(cell, kind) for kind in ("factored", "merged", "auto")]
            rows.append([str(cell["length"]), f"{cell['ms']['dense']:.1f}", *times, cell["auto"], str(cell["rounds"])])
    return github(rows, ["T", "dense", "factored", "merged", "auto", "auto takes", "rounds"])


def residual_single() -> str:
    """Milliseconds and megabytes for one token."""
    rows = []
    for cell in sorted(load("residual_latency").values(), key=lambda cell: (cell["layers"], cell["k"])):
        if cell["length"] == 1:
            sizes = [f"{cell['bytes'][kind] / 1e6:.0f}" for kind in ("dense", "shared", "factored")]
            times = [_with_gain(cell, kind) for kind in ("shared", "factored", "auto")]
            row = [str(cell["layers"]), str(cell["k"]), *sizes, f"{cell['ms']['dense']:.1f}", *times]
            rows.append([*row, str(cell["rounds"])])
    read = [f"{kind} read, MB" for kind in ("dense", "shared", "residual")]
    return github(rows, ["L", "K", *read, "dense", "shared", "residual, factored", "residual, auto", "rounds"])


def _with_gain(cell: dict[str, Any], kind: str) -> str:
    if kind not in cell["ms"]:
        return ""
    median, low, high = cell["over dense"][kind]
    return f"{cell['ms'][kind]:.1f} ({median:.2f}, {low:.2f} to {high:.2f})"


def write(page: str, name: str, table: str) -> str:
    """The page with the table between its two marks replaced."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"the page has no place for {name}: expected {start} and {end}")
    return pattern.sub(lambda _: f"{start}\n{table}\n{end}", page)


def main() -> None:
    page = PAGE.read_text()
    for make in (identity, reuse_latency, reuse_kernels, reuse_memory):
        page = write(page, make.__name__.replace("_", " "), make())
    if (ROOT / "benchmarks" / "results" / "overhead.json").exists():
        for kind in ("export", "layers", "meta"):
            page = write(page, f"overhead, {kind}", overhead(kind))
    PAGE.write_text(page)
    page = RESIDUAL_PAGE.read_text()
    tables = {
        "residual_example": (residual_fit, residual_training),
        "residual_latency": (residual_tokens, residual_single),
    }
    for name, makers in tables.items():
        if (ROOT / "benchmarks" / "results" / f"{name}.json").exists():
            for make in makers:
                page = write(page, make.__name__.replace("_", " "), make())
    RESIDUAL_PAGE.write_text(page)


if __name__ == "__main__":
    main()
