"""The analytic cost model: parameters, multiply-accumulates, bytes and maps as closed forms; peak memory; latency."""

from . import pruned  # noqa: F401  # declares what its operators cost
from .count import Counts, count
from .device import Device
from .latency import Prediction, predict
from .macs import formula, macs_of
from .maps import AttentionMap
from .memory import peak_bytes
from .operations import Access, Operation, operations
from .summary import Numbers, Summary, summarise

__all__ = [
    "Access",
    "AttentionMap",
    "Counts",
    "Device",
    "Numbers",
    "Operation",
    "Prediction",
    "Summary",
    "count",
    "formula",
    "macs_of",
    "operations",
    "peak_bytes",
    "predict",
    "summarise",
]
