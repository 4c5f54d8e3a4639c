"""What a long run is doing at the moment: a live line on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

_CLEAR = "\r\x1b[2K"


class Progress:
    """Shows the step that is under way and how long it has taken; use it in a ``with``, and call it with each step.

    On a terminal one line counts the seconds and disappears at the end; elsewhere, as in a log, every step is a line
    ``doing …``. It is the ``progress`` hook of `fxreuse.verify`.

    >>> import io
    >>> log = io.StringIO()
    >>> with Progress(log) as progress:
    ...     progress("capturing the model")
    >>> log.getvalue()
    'doing: capturing the model\\n'
    """

    def __init__(self, stream: TextIO | None = None, interval: float = 0.2) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._interval = interval
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._ticker: threading.Thread | None = None
        self._step = ""
        self._since = 0.0

    def __enter__(self) -> Progress:
        if self._live:
            self._ticker = threading.Thread(target=self._tick, name="fxreuse-progress", daemon=True)
            self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._ticker is not None:
            self._ticker.join()
            self._write(_CLEAR)

    def __call__(self, step: str) -> None:
        """Say that a step begins."""
        with self._lock:
            self._step, self._since = step, time.monotonic()
        if self._live:
            self._draw()
        else:
            self._write(f"doing: {step}\n")

    def _tick(self) -> None:
        while not self._done.wait(self._interval):
            self._draw()

    def _draw(self) -> None:
        with self._lock:
            if self._step:
                line = f"{time.monotonic() - self._since:5.1f} s  {self._step}"
                self._stream.write(_CLEAR + line[: shutil.get_terminal_size().columns - 1])
                self._stream.flush()

    def _write(self, text: str) -> None:
        with self._lock:
            self._stream.write(text)
            self._stream.flush()
