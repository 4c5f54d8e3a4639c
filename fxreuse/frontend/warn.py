"""The warning about behaviour in training mode that a rewritten model does not have."""

from __future__ import annotations

import warnings

from ..record import Record


class TrainingWarning(UserWarning):
    """The original does something in training mode that the rewritten model does not."""


def warn_of_losses(record: Record) -> None:
    """Warn once, naming every training-only behaviour that was lost and what to do about it."""
    lost = [str(note) for note in record.notes if note.kind == "training"]
    if lost:
        warnings.warn("in training mode the rewritten model lacks: " + "; ".join(lost), TrainingWarning, stacklevel=4)
