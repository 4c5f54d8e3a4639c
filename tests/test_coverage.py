"""The coverage benchmark: a few of its rows run here as it runs them, and it sees what is wrong."""

from __future__ import annotations

import copy

import pytest

from benchmarks.coverage.check import check
from benchmarks.coverage.rows import ROWS, missing
from benchmarks.coverage.verdict import is_rewritten, problems

BY_NAME = {row.name: row for row in ROWS}
FAST = (
    "timm ViT, unfused",
    "torchaudio Conformer, lengths",
    "QKV in thirds, bmm over batch × heads",
    "Several consumers of a map (Zipformer)",
    "With attentive pooling and a classifier",
    "MultiheadAttention, causal and padding",
    "Router alone",
    "BERT",
)


@pytest.mark.parametrize("name", FAST)
def test_a_row_is_right_today(name: str) -> None:
    row = BY_NAME[name]
    if missing(row):
        pytest.skip(f"{missing(row)} is not installed")
    result = check(row)
    assert problems(result) == []
    assert is_rewritten(result) == bool(row.expected)


def test_names_of_rows_are_unique() -> None:
    assert len(BY_NAME) == len(ROWS)


WRONGS = {
    "1 attentions found": {"found": 1},
    "4 attentions found": {"found": 4},
    "stacks": {"parts_match": False},
    "softmaxes rejected": {"rejected": ["layers.0: a projection by parameters"]},
    "identity": {"identity": {"error": 1e-6, "error_float32": 0.0, "tensors": 1, "followers": 0}},
    "materialize": {"materialize": {"error": 1e-3, "tensors": 1, "followers": 1}},
    "recompute": {"recompute": {"error": 0.0, "tensors": 0, "followers": 1, "faults": ["the outputs hold no tensors"]}},
    "nobody followed": {"recompute": {"error": 0.0, "tensors": 1, "followers": 0}},
    "an unknown refusal": {"recompute": {"refused": "UnsupportedError: it did not work"}},
    "a crash": {"failed": "TypeError: int() argument"},
}


@pytest.mark.parametrize("wrong", WRONGS)
def test_a_wrong_row_is_seen(wrong: str) -> None:
    step = {"error": 0.0, "error_float32": 0.0, "tensors": 1, "followers": 1}
    right = {
        "expected": 3,
        "found": 3,
        "source": "3 self",
        "stacks": {"layers.{i}·self": 3},
        "parts_match": True,
        "rejected": [],
        "rejected_expected": 0,
        **{name: copy.deepcopy(step) for name in ("identity", "materialize", "recompute")},
    }
    assert problems(right) == []
    assert len(problems({**right, **WRONGS[wrong]})) == 1
