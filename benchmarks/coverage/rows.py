"""All rows of the coverage table."""

from __future__ import annotations

import importlib.util

from . import (
    rows_decoders,
    rows_encoders,
    rows_handwritten,
    rows_multimodal,
    rows_seq2seq,
    rows_speech,
    rows_torch,
    rows_vision,
    rows_xtransformers,
)
from .row import Row

ROWS: tuple[Row, ...] = (
    *rows_encoders.ROWS,
    *rows_decoders.ROWS,
    *rows_seq2seq.ROWS,
    *rows_vision.ROWS,
    *rows_speech.ROWS,
    *rows_multimodal.ROWS,
    *rows_torch.ROWS,
    *rows_xtransformers.ROWS,
    *rows_handwritten.ROWS,
)


def missing(row: Row) -> str:
    """The package that a row needs and that is not installed, or nothing."""
    return "" if importlib.util.find_spec(row.needs) else row.needs
