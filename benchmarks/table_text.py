"""What the makers of tables share: the data in benchmarks/results/, and tables as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

RESULTS = Path(__file__).parent / "results"


def load(name: str) -> dict[str, Any]:
    """The results of one benchmark.

    Raises:
        FileNotFoundError: where it was not run.
    """
    return json.loads((RESULTS / f"{name}.json").read_text())


def github(rows: list[list[str]], headers: list[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
