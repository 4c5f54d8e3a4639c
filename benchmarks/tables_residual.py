"""The tables of docs/residual.md: fit, training, and latency of shared weights."""

from __future__ import annotations

from typing import Any

from table_text import github, load


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
    for row in found.get("training", ()):
        rows.append([row["start"], f"{row['parameters']:,}", f"{row['before']:.3f}", f"{row['after']:.3f}"])
    return github(rows, ["model and start", "parameters", "bits before", f"after {found['steps']} steps"])


def residual_tokens() -> str:
    """Milliseconds of both lowerings and the automatic one, and how many times as fast as the dense model."""
    rows = []
    for cell in sorted(load("residual_latency").values(), key=lambda cell: cell["length"]):
        if (cell["layers"], cell["k"]) == (18, 3) and cell["length"] > 1:
            times = [_with_gain(cell, kind) for kind in ("factored", "merged", "auto")]
            compiled = f"{cell['ms']['dense, compiled']:.1f}", _with_gain(cell, "auto, compiled")
            rows.append([str(cell["length"]), f"{cell['ms']['dense']:.1f}", *times, *compiled, cell["auto"]])
    compiled = "dense, compiled", "auto, compiled"
    return github(rows, ["T", "dense", "factored", "merged", "auto", *compiled, "auto takes"])


def residual_single() -> str:
    """Milliseconds and megabytes for one token."""
    rows = []
    for cell in sorted(load("residual_latency").values(), key=lambda cell: (cell["layers"], cell["k"])):
        if cell["length"] == 1:
            row = [str(cell["layers"]), str(cell["k"])]
            row += [f"{cell['bytes'][kind] / 1e6:.0f}" for kind in ("dense", "shared", "auto")]
            for mode in ("", ", compiled"):
                row.append(f"{cell['ms'][f'dense{mode}']:.1f}")
                row += [_with_gain(cell, f"{kind}{mode}") for kind in ("shared", "auto")]
            rows.append(row)
    names = ["dense", "shared", "residual"]
    read, compiled = [f"{name} read, MB" for name in names], [f"{name}, compiled" for name in names]
    return github(rows, ["L", "K", *read, *names, *compiled])


def _with_gain(cell: dict[str, Any], kind: str) -> str:
    median, low, high = cell["over dense"][kind]
    return f"{cell['ms'][kind]:.1f} ({median:.2f}, {low:.2f} to {high:.2f})"


TABLES = {
    "residual fit": residual_fit,
    "residual training": residual_training,
    "residual tokens": residual_tokens,
    "residual single": residual_single,
}
