"""Run many rows, each in a process of its own, so that one that fails or hangs cannot hide the others."""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from .check import check
from .models import Separate, Stack
from .row import Row, states

# CPU seconds that a row may take; the clock on the wall runs on while a busy machine does other things.
LIMIT = 180
_WALL = 3600.0
WARM = Row("warm-up", "", {"self": 2}, lambda: states(Stack(Separate, 2)))


def run(row: Row, limit: int = LIMIT) -> dict[str, Any]:
    """The result of a row, run in a fork of this process."""
    return row.known | isolated(lambda: check(row), limit)


def isolated(work: Callable[[], dict[str, Any]], limit: int = LIMIT) -> dict[str, Any]:
    """What ``work`` returns, from a fork of this process; ``failed`` where that dies or takes too long."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, work, limit), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(_WALL) else {"failed": "does not end"}
    except EOFError:
        process.join()
        late = process.exitcode == -signal.SIGXCPU or process.exitcode == -signal.SIGKILL
        return {"failed": f"took more than {limit} CPU seconds" if late else f"ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def warm_up() -> None:
    """Import what every row needs, so that each fork of this process need not."""
    import transformers

    assert transformers.PreTrainedModel
    check(WARM)


def _work(sender: Connection, work: Callable[[], dict[str, Any]], limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    torch.set_num_threads(1)
    sender.send(work())
    sender.close()
