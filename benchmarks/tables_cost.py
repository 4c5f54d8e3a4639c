"""The tables of docs/cost_model.md: counts against torch's own, peak memory against what was measured."""

from __future__ import annotations

from collections import Counter
from typing import Any

from table_text import github, load

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


TABLES = {"flops": flops, "peak_memory": peak_memory}
