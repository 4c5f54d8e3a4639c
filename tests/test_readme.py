"""The README holds what it says: its examples run, its plans are plans, its test line is where `.ci/run` looks."""

import doctest
import re
from pathlib import Path

import pytest

from fxreuse.plans.plan import Plan

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_examples():
    failed, attempted = doctest.testfile(str(README), module_relative=False, encoding="utf-8")
    assert attempted > 0
    assert failed == 0


@pytest.mark.parametrize("plan", re.findall(r"^\| `([^`]+)` \| .*layer", TEXT.split("## Plans")[1], re.M))
def test_plans(plan):
    assert str(Plan.parse(plan)) == plan


def test_the_line_that_runs_the_tests():
    [block] = re.findall(r"<!-- test line -->\n```sh\n(.*?)```\n<!-- end of test line -->", TEXT, re.S)
    assert block.count("\n") == 1
    assert block.strip().endswith("-m pytest")
