"""The analytic cost model: parameters, multiply-accumulates and attention-map bytes, exact, in symbolic sizes."""

from . import pruned  # noqa: F401  # declares what its operators cost
from .count import Counts, count
from .macs import formula, macs_of
from .maps import AttentionMap
from .operations import Access, Operation, operations
from .summary import Numbers, Summary, summarise

__all__ = [
    "Access",
    "AttentionMap",
    "Counts",
    "Numbers",
    "Operation",
    "Summary",
    "count",
    "formula",
    "macs_of",
    "operations",
    "summarise",
]
