"""The page on shared weights holds what it says."""

import doctest
from pathlib import Path


def test_examples_of_the_document():
    page = Path(__file__).parents[1] / "docs" / "residual.md"
    failed, attempted = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert attempted > 10
    assert failed == 0
