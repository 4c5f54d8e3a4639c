"""Write the tables in docs/ from the measurements in benchmarks/results/.

A page has every table between two marks, ``<!-- name -->`` and ``<!-- end of name -->``. Where the data of a table
are not there, it stays as it is.
"""

from __future__ import annotations

import re
from pathlib import Path

import tables_cost
import tables_fiak
import tables_latency
import tables_measurements
import tables_residual

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {
    "cost_model": tables_cost.TABLES,
    "measurements": tables_measurements.TABLES,
    "latency": tables_latency.TABLES,
    "residual": tables_residual.TABLES,
    "fiak": tables_fiak.TABLES,
}


def with_table(page: str, name: str, table: str) -> str:
    """The text of a page with the table between its two marks replaced."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"there is no place for the table {name!r}: expected {start} and {end}")
    return pattern.sub(lambda _: f"{start}\n{table}\n{end}", page)


def main() -> None:
    for name, tables in PAGES.items():
        path = DOCS / f"{name}.md"
        page = path.read_text()
        for title, make in tables.items():
            try:
                table = make()
            except FileNotFoundError as missing:
                print(f"docs/{name}.md, {title}: not measured yet ({Path(missing.filename).name})")
                continue
            page = with_table(page, title, table)
        path.write_text(page)


if __name__ == "__main__":
    main()
