"""Export without what torch says of a failed attempt: the error that follows says it."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

_LOGGERS = ("torch.export._trace", "torch.fx.experimental.symbolic_shapes")


class _Muted:
    """A stream that drops what one thread writes to it, and passes on what others write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Without the graphs that torch prints to stderr, and the logs that it writes, where an export fails.

    >>> with quiet_export():
    ...     print("a graph of a hundred lines", file=sys.stderr)
    """
    loggers = [(logger, logger.disabled) for logger in map(logging.getLogger, _LOGGERS)]
    muted: Any = _Muted(sys.stderr)
    for logger, _ in loggers:
        logger.disabled = True
    try:
        with contextlib.redirect_stderr(muted):
            yield
    finally:
        for logger, disabled in loggers:
            logger.disabled = disabled
