"""The picture of a report: MACs and memory against the length, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from .cost_report import CostReport, Row

_SCALES = {"MAC": (1e9, "GMACs"), "B": (2**20, "MiB"), "s": (1e-3, "ms")}
_WIDE = 3
_DRAWN = ("MACs", "attention maps", "peak memory", "latency")


def draw(report: CostReport, path: Path) -> None:
    """Draw a report into a file; see `CostReport.plot`."""
    check_picture(path)
    columns = report.columns()
    if len(set(columns)) < 2:
        raise InputError(f"plot: the report shows one size, which gives no curve; {_several(report)}")
    plots = pyplot()
    rows = [row for row in report.rows if row.name.startswith(_DRAWN)]
    lines = -(-len(rows) // _WIDE)
    figure, axes = plots.subplots(lines, _WIDE, figsize=(4.2 * _WIDE, 3.4 * lines), squeeze=False, layout="constrained")
    panels = list(axes.flat)
    for row, axis in zip(rows, panels, strict=False):
        _panel(axis, report, row, columns)
    for axis in panels[len(rows) :]:
        axis.set_visible(False)
    fixed = ", ".join(f"{name} = {size:,}" for name, size in report.fixed().items() if name != report.running)
    plan = f", plan {report.plan}" if report.plan else ""
    figure.suptitle(f"{report.model}{plan}" + (f", {fixed}" if fixed else ""))
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"plot: {str(path)!r} cannot be written ({error.strerror}); give another file") from error
    finally:
        plots.close(figure)


def _several(report: CostReport) -> str:
    """What to do where a report shows one size."""
    free = [name for name in report.before.symbols if name not in report.before.relations]
    name = report.running if report.running in report.before.names.sizes else next(iter(free), None)
    if name is None:
        return "the model has no free size"
    size = report.numbers[0][0].sizes[name]
    return f"give several of {name}: sizes={{{name!r}: ({size}, {2 * size})}}, or --size {name}={size},{2 * size}"


def _panel(axis: Any, report: CostReport, row: Row, columns: list[int]) -> None:
    scale, unit = _SCALES[row.unit]
    axis.plot(columns, [value / scale for value in row.before], marker="o", label="before" if report.plan else None)
    if report.plan:
        axis.plot(columns, [value / scale for value in row.after], marker="s", label="after")
        axis.legend()
    axis.set_title(row.name)
    axis.set_xlabel("tokens or frames T" if report.running == "T" else report.running)
    axis.set_ylabel(unit)
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def check_picture(path: Path) -> None:
    """Raise InputError for a file that is no picture, or in a folder that is not there."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise InputError(f"plot: expected a file that ends in .png or .svg, found {str(path)!r}")
    if not path.parent.is_dir():
        raise InputError(f"plot: there is no folder {str(path.parent)!r} to write {path.name} into")


def pyplot() -> Any:
    """Matplotlib's interface for files, or UnsupportedError where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UnsupportedError("matplotlib is not installed; run: pip install 'fxreuse[plot]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot as plots

    return plots
