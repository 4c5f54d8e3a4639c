"""The tables of docs/fiak.md: learning, whole models, and one long attention."""

from __future__ import annotations

from statistics import mean, stdev

from table_text import github, load


def fiak_learning() -> str:
    """Mean and standard error over seeds, and the difference to the dense baseline of the same seeds."""
    found = load("fiak_learning")
    rows = []
    for name, cells in found.items():
        data, _, row = name.partition(": ")
        if row == "settings" or len(cells) < 2:
            continue
        dense = found[f"{data}: dense baseline"]
        gains = [value - dense[seed] for seed, value in cells.items() if seed in dense]
        texts = [f"{mean(values):.2f} ± {stdev(values) / len(values) ** 0.5:.2f}" for values in (cells.values(), gains)]
        rows.append([data, row, *(texts if row != "dense baseline" else (texts[0], "")), str(len(cells))])
    return github(rows, ["data", "model", "result", "against dense", "seeds"])


def fiak_deit() -> str:
    """Milliseconds, images a second, and gains beside the work that is saved."""
    rows = []
    for cell in (cell for name, cell in load("fiak_latency").items() if name.startswith("deit")):
        for name, time in cell["ms"].items():
            row = [str(cell["batch"]), name, f"{time:.1f}", f"{1e3 * cell['batch'] / time:.1f}"]
            saved = cell["savings"].get(name)
            row += (
                ["", "", ""]
                if saved is None
                else [f"{100 * saved[key]:.1f} %" for key in ("executed", "algorithmic", "skipped")]
            )
            for against in ("as given", "fused"):
                gain = cell[f"over {against}"].get(name)
                row.append("" if gain is None else f"{gain[0]:.2f} ({gain[1]:.2f} to {gain[2]:.2f})")
            rows.append(row)
    headers = ["batch", "model", "ms", "images/s", "work saved", "of the algorithm", "scores skipped"]
    return github(rows, [*headers, "over as given", "over fused"])


def fiak_long() -> str:
    """Milliseconds of one attention, and how many times faster than fused."""
    rows = []
    for cell in (cell for name, cell in load("fiak_latency").items() if name.startswith("long")):
        row = [str(cell["block"]), f"{100 * (1 - cell['kept']):.1f} %", f"{cell['ms']['fused']:.1f}"]
        for name, (gain, low, high) in cell["over fused"].items():
            row.append(f"{cell['ms'][name]:.1f} · {gain:.2f} ({low:.2f} to {high:.2f})")
        rows.append(row)
    return github(rows, ["block", "cut", "fused, ms", "mask", "gather", "flex"])


def fiak_kernel() -> str:
    """Nanoseconds of a score in the fused kernel, by the number of keys."""
    rows = []
    for cell in (cell for name, cell in load("fiak_latency").items() if name.startswith("kernel")):
        keys = dict.fromkeys(name.partition(" ")[0] for name in cell["ns"])
        for mask in dict.fromkeys(name.partition(" ")[2] for name in cell["ns"]):
            rows.append([str(cell["batch"]), mask, *(f"{cell['ns'][f'{count} {mask}']:.2f}" for count in keys)])
    return github(rows, ["batch", "ns a score", *(f"{count} keys" for count in keys)])


def triton_kernels() -> str:
    """By the kind of numbers: how many kernels, the largest error, and the most shared memory."""
    rows = []
    found = load("triton_kernels")
    for dtype in dict.fromkeys(row["dtype"] for row in found):
        cells = [row for row in found if row["dtype"] == dtype]
        kernels = [row for row in cells if "shared" in row]
        errors = [row["error"] for row in kernels if row["error"] is not None]
        ours = [row for row in kernels if row["tile"] is not None]  # the others depend on the GPU
        most = max(row["shared"]["80"] for row in ours), max(row["shared"]["90"] for row in kernels)
        shared = [f"{size / 1024:.0f}" for size in most]
        error = f"{max(errors):.1e}" if errors else "not run"
        rows.append([dtype, str(len(kernels)), error, *shared, str(len(cells) - len(kernels))])
    headers = ["numbers", "kernels", "largest error", "KiB, 8.0", "KiB, 9.0", "masks instead"]
    return github(rows, headers)


TABLES = {
    "fiak kernel": fiak_kernel,
    "fiak learning": fiak_learning,
    "fiak deit": fiak_deit,
    "fiak long": fiak_long,
    "triton kernels": triton_kernels,
}
