"""What an export does over and over for the same answer, done once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import sympy
from torch.fx._lazy_graph_module import _use_lazy_graph_module


@contextlib.contextmanager
def numbers_remembered() -> Iterator[None]:
    """Meanwhile, sympy remembers of an expression whether it is a number.

    Torch asks at every look at a size, sympy goes through the whole expression to answer, and a length behind seven
    convolutions is a large one: a sixth of the time of an export. An expression never changes, nor does the answer.

    >>> with numbers_remembered():
    ...     (sympy.Symbol("n") + 1).is_number, (sympy.sqrt(2) + 1).is_number
    (False, True)
    """
    look: property = vars(sympy.Expr)["is_number"]
    known: dict[sympy.Expr, bool] = {}

    def is_number(expression: sympy.Expr) -> bool:
        answer = known.get(expression)
        if answer is None:
            answer = known[expression] = look.__get__(expression)
        return answer

    with mock.patch.object(sympy.Expr, "is_number", property(is_number)):
        yield


@contextlib.contextmanager
def compiled_when_run() -> Iterator[None]:
    """Meanwhile, graphs that torch makes are compiled when they are run.

    Of those that a non-strict export makes on its way none is, and each of its steps would compile anew. A strict one
    reads what only compiling leaves in a graph module.

    >>> import torch
    >>> from torch.fx.experimental.proxy_tensor import make_fx
    >>> with compiled_when_run():
    ...     graph = make_fx(lambda x: x + 1)(torch.zeros(2))
    >>> graph(torch.zeros(2))
    tensor([1., 1.])
    """
    with _use_lazy_graph_module(True):
        yield
