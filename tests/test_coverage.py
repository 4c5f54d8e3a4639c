"""The coverage table: a few of its rows run here as the benchmark runs them; its data bears its claims."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.coverage import __main__ as command
from benchmarks.coverage.check import check
from benchmarks.coverage.page import PAGE, render
from benchmarks.coverage.rows import ROWS, missing
from benchmarks.coverage.verdict import is_rewritten, problems, unreached

BY_NAME = {row.name: row for row in ROWS}
FAST = (
    "timm ViT, unfused",
    "torchaudio Conformer, lengths",
    "QKV in thirds, bmm over batch × heads",
    "Several consumers of a map (Zipformer)",
    "With attentive pooling and a classifier",
    "MultiheadAttention, causal and padding",
    "MultiheadAttention, weights returned",
    "einsum with head weights",
    "Softmax as exp / sum",
    "Soft-capped scores",
    "Router alone",
    "BERT",
)


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return json.loads(command.RESULTS.read_text())


@pytest.mark.parametrize("name", FAST)
def test_a_row_is_right_today(name: str) -> None:
    row = BY_NAME[name]
    if missing(row):
        pytest.skip(f"{missing(row)} is not installed")
    result = check(row)
    assert problems(result) == []
    assert is_rewritten(result) == (row.expected > 0 and not row.refused)


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


def test_what_must_be_reached_is(data: dict[str, Any]) -> None:
    assert unreached(data) == []


UNKNOWN = {"refused": "UnsupportedError: it did not work"}
SHORT = {
    "architectures, at least 70": lambda data: [data["rows"].pop(name) for name in list(data["rows"])[30:]],
    "attentions found of": lambda data: data["rows"]["BERT"].update(found=1),
    "that are no attention": lambda data: data["rows"]["BERT"].update(found=3),
    "rewritten, at least 95%": lambda data: [row.update(recompute=UNKNOWN) for row in list(data["rows"].values())[:9]],
    "attentions missed by depth": lambda data: data["scaling"]["BERT"][0].update(found=11),
    "recognition of 48 layers takes 0.60 s": lambda data: [one.update(find=0.6) for one in data["scaling"]["BERT"]],
    "times as long for four times as many": lambda data: data["scaling"]["Llama"][0].update(find=0.001),
}


@pytest.mark.parametrize("short", SHORT)
def test_what_falls_short_is_seen(short: str, data: dict[str, Any]) -> None:
    data = copy.deepcopy(data)
    SHORT[short](data)
    assert any(short in one for one in unreached(data))


def test_the_command_fails_where_a_row_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "coverage.json"
    results.write_text(json.dumps(data))
    monkeypatch.setattr(command, "RESULTS", results)
    monkeypatch.setattr(command, "PAGE", tmp_path / "coverage.md")
    monkeypatch.setattr(command, "warm_up", lambda: None)
    monkeypatch.setattr("sys.argv", ["coverage"])
    assert command.main() == 0  # there is nothing left to run
    assert (tmp_path / "coverage.md").read_text() == render(json.loads(results.read_text()))  # with the versions here
    data = copy.deepcopy(data)
    data["rows"]["BERT"]["found"] = 1
    results.write_text(json.dumps(data))
    assert command.main() == 1
    assert "WRONG BERT: 1 attentions found, 2 expected" in capsys.readouterr().out


def test_the_page_is_made_from_the_data(data: dict[str, Any]) -> None:
    assert PAGE.read_text() == render(data)


CAPPED = (
    "layers.1: lowering=recompute needs scores of the form α·QKᵀ + β, but its scores go through an operator that is no "
    "factor, sum or mask (tanh: aten.tanh.default, m.py:1)"
)
WRONGS = {
    "1 attentions found": {"found": 1},
    "4 attentions found": {"found": 4},
    "stacks": {"parts_match": False},
    "softmaxes rejected": {"rejected": ["layers.0: a projection by parameters"]},
    "identity": {"identity": {"error": 1e-6, "error_float32": 0.0, "tensors": 1, "followers": 0}},
    "materialize": {"materialize": {"error": 1e-3, "tensors": 1, "followers": 1}},
    "recompute": {"recompute": {"error": 0.0, "tensors": 0, "followers": 1, "faults": ["the outputs hold no tensors"]}},
    "nobody followed": {"recompute": {"error": 0.0, "tensors": 1, "followers": 0}},
    "an unknown refusal": {"recompute": UNKNOWN},
    "a refusal that is not expected": {"recompute": {"refused": CAPPED}},
    "a model that is not captured": {"refused": f"UnsupportedError: {CAPPED}"},
    "exact, refused for scores not affine expected": {"refused_expected": {"recompute": "scores not affine"}},
    "taken, refused for FlexAttention expected": {"refused_expected": {"whole": "FlexAttention"}},
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
        "refused_expected": {},
        **{name: copy.deepcopy(step) for name in ("identity", "materialize", "recompute")},
    }
    assert problems(right) == []
    assert len(problems({**right, **WRONGS[wrong]})) == 1
