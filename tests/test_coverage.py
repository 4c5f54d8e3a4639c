"""The coverage table: a few of its rows run here as the benchmark runs them; its data bears its claims."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from benchmarks.coverage.__main__ import RESULTS
from benchmarks.coverage.check import check
from benchmarks.coverage.page import PAGE, render
from benchmarks.coverage.rows import ROWS, missing
from benchmarks.coverage.verdict import is_rewritten, problems, summary

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
    "Swin",
    "GPT-NeoX",
)


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return json.loads(RESULTS.read_text())


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


def test_the_data_has_every_row_as_it_is_defined(data: dict[str, Any]) -> None:
    defined = {row.name: (row.family, row.expected, row.source, row.not_attention) for row in ROWS}
    measured = {
        name: (row["family"], row["expected"], row["source"], row["rejected_expected"])
        for name, row in data["rows"].items()
    }
    assert measured == defined


def test_every_row_is_right(data: dict[str, Any]) -> None:
    assert {name: problems(row) for name, row in data["rows"].items() if problems(row)} == {}


def test_what_must_be_reached(data: dict[str, Any]) -> None:
    numbers = summary(data["rows"])
    assert numbers["attending"] >= 70
    assert numbers["correct"] == numbers["rows"]
    assert numbers["sites_found"] == numbers["sites"]
    assert numbers["false_positives"] == 0
    assert numbers["rewritten"] >= 0.95 * numbers["attending"]


@pytest.mark.parametrize("model", ["BERT", "Llama"])
def test_recognition_is_fast_and_linear_in_layers(data: dict[str, Any], model: str) -> None:
    measured = {one["layers"]: one for one in data["scaling"][model]}
    assert set(measured) == {12, 24, 48}
    assert all(one["found"] == layers for layers, one in measured.items())
    assert measured[48]["find"] < 0.5
    assert measured[48]["find"] / measured[12]["find"] < 1.3 * 48 / 12


def test_the_page_is_made_from_the_data(data: dict[str, Any]) -> None:
    assert PAGE.read_text() == render(data)


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
