"""The examples in the docstrings of every module of the three packages."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest

import fxreuse
import fxreuse.cost_model
import fxreuse.passes

PACKAGES = (fxreuse, fxreuse.passes, fxreuse.cost_model)


def modules(package: ModuleType) -> list[str]:
    found = [info.name for info in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    return [package.__name__, *(name for name in found if not name.endswith("__main__"))]


NAMES = sorted({name for package in PACKAGES for name in modules(package)})


def examples(name: str) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name)
    return [test for test in found if test.examples]


WITH_EXAMPLES = [name for name in NAMES if examples(name)]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_package_is_looked_at(package: ModuleType) -> None:
    assert len(modules(package)) > 5


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name: str) -> None:
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in examples(name):
        runner.run(test, out=report.append)
    assert not runner.summarize(verbose=False).failed, "".join(report)
