"""What every test runs under: one thread, one seed, as many examples as the occasion calls for, and which process."""

from __future__ import annotations

import functools
import os
import random
from typing import Any

import hypothesis
import pytest
import torch

_SETTINGS = {"deadline": None, "print_blob": True, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("dev", max_examples=15, **_SETTINGS)
hypothesis.settings.register_profile("ci", max_examples=40, derandomize=True, **_SETTINGS)
hypothesis.settings.register_profile("thorough", max_examples=500, **_SETTINGS)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))

# Models here are so small that a second thread costs more than it brings.
torch.set_num_threads(1)

try:
    from transformers.utils import logging
except ImportError:
    pass
else:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A process runs whole files, and one process all files that share captured architectures."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    @functools.cache
    def shares_captures(file: str) -> bool:
        return "from .captures import" in (config.rootpath / file).read_text(encoding="utf-8")

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "captures" if shares_captures(file) else file

    return Scheduling(config, log)
