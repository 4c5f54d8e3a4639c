"""The tables of docs/cost_model.md: counts against torch's own, peak memory against what was measured."""

from __future__ import annotations

from collections import Counter
from typing import Any

from table_text import github, load

_LONGEST = 160
FORMS = {"original": "as it is", "materialize": "rewritten, materialize", "recompute": "rewritten, recompute"}


def flops() -> str:
    """How many architectures have equal counts at both sizes, by form."""
    rows = load("flops")["rows"].values()
    cells = []
    for form, text in FORMS.items():
        found = Counter(_verdict(row, form) for row in rows if form in row)
        cells.append([text, *(str(found[verdict]) for verdict in ("equal", "dead", "refused", "other"))])
    headers = ["model", "equal", "equal but for unread work", "refused", "differs or fails"]
    return github(cells, headers)


def _verdict(row: dict[str, Any], form: str) -> str:
    if _equal(row[form]):
        return "equal"
    if form == "original" and _equal(row.get("captured", {})):
        return "dead"
    return "refused" if "refused" in row[form] else "other"


def _equal(one: dict[str, Any]) -> bool:
    return "macs" in one and all(ours == theirs for ours, theirs in one["macs"])


def peak_memory() -> str:
    """Bytes, predicted and measured."""
    rows = []
    for name, found in load("peak_memory").items():
        for row in found["rows"]:
            form = FORMS[row["form"]].replace("rewritten", found["plan"])
            ratio = f"{row['predicted'] / row['measured']:.3f}"
            size = f"{name}, {row['size']:,} {found['unit']}"
            rows.append([size, form, f"{row['measured']:,}", f"{row['predicted']:,}", ratio])
    return github(rows, ["model", "form", "measured, bytes", "predicted, bytes", "ratio"])


def flops_unequal() -> str:
    """The rows that are not equal in every form, with what keeps them from it."""
    cells = []
    for name, row in load("flops")["rows"].items():
        for form, text in FORMS.items():
            if form in row and _verdict(row, form) != "equal":
                one = row[form]
                why = one.get("refused") or one.get("failed") or "; ".join(f"{a:,} and {b:,}" for a, b in one["macs"])
                cells.append([name, text, _verdict(row, form).replace("dead", "unread work"), _short(why)])
        if "failed" in row:
            cells.append([name, "", "not captured", _short(row["failed"])])
    return github(cells, ["model", "form", "", "why, or the counts of ours and torch's"])


def _short(reason: str) -> str:
    """A reason that fits into a table."""
    text = reason.replace("|", "\\|")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST].rsplit(' ', 1)[0]} …"


def large_models() -> str:
    """Seconds and memory of the whole command."""
    rows = [
        [
            found["title"],
            f"{found['params']:,}",
            found["plan"] or "none",
            f"{found['seconds']:.0f}",
            f"{found['cpu_seconds']:.0f}",
            f"{found['resident_bytes'] / 2**30:.2f}",
        ]
        for found in load("large_models")["models"].values()
    ]
    return github(rows, ["model", "parameters", "plan", "seconds", "of processor time", "resident, GiB"])


TABLES = {"flops": flops, "flops unequal": flops_unequal, "peak_memory": peak_memory, "large models": large_models}
