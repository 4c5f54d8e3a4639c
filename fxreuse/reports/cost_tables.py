"""A report as text: totals, quantities over lengths, where the savings come from, the parts of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import sympy
from tabulate import tabulate

from ..length_text import length_text
from ..priors.pruning import pruning_table

if TYPE_CHECKING:
    from .cost_report import CostReport

CONVENTION = (
    "1 multiply-accumulate is 1 MAC; contractions count as they are executed, elementwise work does not.",
    "Peak memory is that of activations in one forward pass on a CPU, parameters and inputs not counted.",
)
_UNITS = {"B": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))}
_COUNTS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"), (1, ""))
_MOST = 12


def render(report: CostReport, form: str) -> str:
    """All tables of a report, in one of tabulate's forms."""
    blocks = [_title(report, form), _totals(report, form), _formulas(report), _lengths(report, form)]
    if report.plan:
        blocks.append(_savings(report, form))
    if report.record is not None and report.record.pruned:
        blocks.append(pruning_table(report.record.pruned, form))
    if report.decoding is not None:
        blocks.append(_decoding(report))
    if report.record is not None:
        blocks.append("\n".join(f"note: {note}" for note in report.record.notes if note.kind == "cost"))
    return "\n\n".join(block for block in blocks if block)


def breakdown(report: CostReport, form: str = "simple") -> str:
    """The parts of the model, before and after."""
    tables = []
    for when, parts in report.breakdown().items():
        if when == "after" and not report.plan:
            continue
        params, macs, seconds = (sum(getattr(p, field) for p in parts) for field in ("params", "macs", "seconds"))
        rows = [
            [
                part.name,
                *(f"{part.params:,}", _share(part.params, params)),
                *(count_text(part.macs), _share(part.macs, macs)),
                *(time_text(part.seconds), _share(part.seconds, seconds)),
            ]
            for part in parts
            if part.params or part.macs
        ]
        rows.append(["all", f"{params:,}", "", count_text(macs), "", time_text(seconds), ""])
        headers = [when, "parameters", "share", "MACs", "share", "predicted, eager", "share"]
        tables.append(_table(rows, headers, form))
    sizes = ", ".join(f"{name} = {size:,}" for name, size in report.numbers[-1][0].sizes.items())
    return "\n\n".join([f"parts of the model at {sizes}", *tables])


def bytes_text(size: float) -> str:
    """Bytes for people.

    >>> bytes_text(3 * 2**20)
    '3.00 MiB'
    """
    factor, unit = next((entry for entry in _UNITS["B"] if size >= entry[0]), (1, "B"))
    return f"{size / factor:.2f} {unit}" if factor > 1 else f"{size:.0f} {unit}"


def time_text(seconds: float) -> str:
    """A time for people.

    >>> time_text(0.0123), time_text(0.013), time_text(0.238), time_text(0.9996), time_text(2.5)
    ('12.3 ms', '13.0 ms', '238 ms', '1.00 s', '2.50 s')
    """
    return f"{seconds:.2f} s" if seconds >= 0.9995 else f"{1e3 * seconds:#.3g}".rstrip(".") + " ms"


def count_text(number: float) -> str:
    """A number of operations for people.

    >>> count_text(74_066_523_136)
    '74.07 G'
    """
    factor, unit = next((entry for entry in _COUNTS if number >= entry[0]), (1, ""))
    return f"{number / factor:.2f} {unit}" if factor > 1 else f"{number:.0f}"


_SHOWN = {"B": bytes_text, "MAC": count_text, "s": time_text}


def polynomial(expression: sympy.Expr) -> str:
    """An expression as a person writes it, with the highest powers first.

    >>> b, t = sympy.symbols("B T")
    >>> polynomial(384 * b * t**2 + 7077888 * b * t)
    '384·B·T² + 7,077,888·B·T'
    """
    terms = sorted(sympy.Add.make_args(sympy.expand(expression)), key=_order)
    return " + ".join(map(_term, terms)).replace("+ -", "- ")


def _order(term: sympy.Expr) -> tuple[int, str]:
    """The highest powers first."""
    _, rest = term.as_coeff_Mul()
    powers = [factor.as_base_exp()[1] for factor in sympy.Mul.make_args(rest)]
    return -sum(int(power) for power in powers if power.is_Integer), str(rest)


def _term(term: sympy.Expr) -> str:
    number, rest = term.as_coeff_Mul()
    factors = [] if rest == 1 else sorted(map(_factor, sympy.Mul.make_args(rest)))
    digits = f"{int(number):,}" if number.is_Integer else str(number)
    return "·".join([digits, *factors] if number != 1 or not factors else factors)


def _factor(factor: sympy.Expr) -> str:
    base, power = factor.as_base_exp()
    text = length_text(base)
    return text if power == 1 else f"{text}{'²' if power == 2 else f'^{power}'}"


def _title(report: CostReport, form: str) -> str:
    plan = f", plan {report.plan}" if report.plan else ""
    relations = [f"{name} = {length_text(length)}" for name, length in report.before.relations.items()]
    heading = [f"## {report.model}{plan}", ""] if form == "github" else [f"{report.model}{plan}"]
    return "\n".join([*heading, *CONVENTION, f"Latency is predicted for {report.device.name}.", *relations])


def _totals(report: CostReport, form: str) -> str:
    before, after = report.before, report.after
    rows = [["parameters", f"{before.params:,}", f"{after.params:,}", _ratio(before.params, after.params)]]
    for dtype, size in before.weights.items():
        rest = after.weights.get(dtype, 0)
        name = f"weights in {str(dtype).removeprefix('torch.')}"
        rows.append([name, bytes_text(size), bytes_text(rest), _ratio(size, rest)])
    return _before_after(report, rows, [""], form)


def _formulas(report: CostReport) -> str:
    rows = [("MACs", "macs"), ("attention maps, bytes", "map_bytes"), ("MACs, forward and backward", "macs_training")]
    lines = []
    for name, field in rows:
        before, after = (polynomial(getattr(summary, field)) for summary in (report.before, report.after))
        if not report.plan or before == after:
            lines.append(f"{name}: {before}")
        else:
            lines += [f"{name}, before: {before}", f"{name}, after:  {after}"]
    if report.after.macs_algorithmic != report.after.macs:
        lines.append(f"MACs that the pruned algorithm asks for: {polynomial(report.after.macs_algorithmic)}")
    return "\n".join(lines)


def _lengths(report: CostReport, form: str) -> str:
    fixed = ", ".join(f"{name} = {size:,}" for name, size in report.fixed().items() if name != report.running)
    columns = [f"{report.running} = {value:,}" if value else "" for value in report.columns()]
    rows: list[list[str]] = []
    for row in report.rows:
        shown = _SHOWN[row.unit]
        if not report.plan:
            rows.append([row.name, *map(shown, row.before)])
            continue
        rows.append([row.name, "before", *map(shown, row.before)])
        rows.append(["", "after", *map(shown, row.after)])
        rows.append(["", "ratio", *(f"{ratio:.2f}×" for ratio in row.ratios)])
    headers = [f"at {fixed}" if fixed else "", *([""] if report.plan else []), *columns]
    return _table(rows, headers, form)


def _savings(report: CostReport, form: str) -> str:
    rows = [
        [saving.module or "the model itself", f"{saving.count}", f"{saving.params:,}", polynomial(saving.macs)]
        for saving in report.savings[:_MOST]
    ]
    if len(report.savings) > _MOST:
        rows.append([f"and {len(report.savings) - _MOST} more", "", "", ""])
    if not rows:
        return "nothing is saved"
    return _table(rows, ["saved in", "modules", "parameters", "MACs"], form, left=(0, 3))


def _decoding(report: CostReport) -> str:
    found = report.decoding
    assert found is not None
    lines = [f"a step of n tokens against a past of S: {polynomial(found.macs_before)} MACs"]
    kept = f"keys and values of a token: {bytes_text(found.kv_bytes_per_token_before)}"
    if report.plan:
        lines.append(f"after: {polynomial(found.macs_after)} MACs")
        kept += f" before, {bytes_text(found.kv_bytes_per_token_after)} after: followers keep no keys"
    return "\n".join([*lines, kept])


def _before_after(report: CostReport, rows: Sequence[Sequence[str]], headers: Sequence[str], form: str) -> str:
    if not report.plan:
        return _table([row[:2] for row in rows], [*headers, "model"], form)
    return _table(rows, [*headers, "before", "after", "before / after"], form)


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str], form: str, left: Sequence[int] = (0,)) -> str:
    align = ["left" if column in left else "right" for column in range(len(headers))]
    return tabulate(rows, headers, tablefmt=form, disable_numparse=True, colalign=align)


def _ratio(before: float, after: float) -> str:
    return f"{before / after:.2f}×" if after else ""


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""
