"""The tables of docs/measurements.md: capture, and reuse of attention maps."""

from __future__ import annotations

import functools

from table_text import github, load


def identity() -> str:
    found = load("identity")
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
    return github(rows, headers)


def overhead(kind: str) -> str:
    """One of the tables of overhead.json: ``export``, ``layers`` or ``meta``."""
    found = load("overhead")
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
    return github(cells, headers)


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
    kinds = ["map", "original", "recompute", "recompute values=2", "materialize", "materialize values=2"]
    rows = [[length, *(f"{row[kind] / 2**20:.0f}" for kind in kinds)] for length, row in load("reuse_memory").items()]
    return github(rows, ["T", *kinds])


TABLES = {
    "identity": identity,
    **{f"overhead, {kind}": functools.partial(overhead, kind) for kind in ("export", "layers", "meta")},
    "reuse latency": reuse_latency,
    "reuse kernels": reuse_kernels,
    "reuse memory": reuse_memory,
}
