"""What every test runs under: one thread, one seed, and the number of examples that the occasion calls for."""

from __future__ import annotations

import os
import random

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
