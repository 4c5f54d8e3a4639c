"""Models that keep a tensor for their next call: nothing that a capture made is in there afterwards."""

from __future__ import annotations

import functools
import gc
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fxreuse.errors import CaptureError
from fxreuse.frontend.capture import capture
from fxreuse.frontend.inputs import infer

X = torch.randn(2, 5, 6)
KEPT: dict[int, torch.Tensor] = {}
TABLE: torch.Tensor | None = None
LIST: list[torch.Tensor] = []

Table = Callable[[nn.Module, int], torch.Tensor]


def make(length: int) -> torch.Tensor:
    return torch.arange(length, dtype=torch.float32)


@functools.lru_cache
def cached(length: int) -> torch.Tensor:
    return make(length)


def while_not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that keeps nothing while a model is compiled."""
    kept = functools.lru_cache(function)

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args) if torch.compiler.is_compiling() else kept(*args)

    return wrapper


ELSEWHERE = types.ModuleType("kept_elsewhere")
exec("import functools, torch\n@functools.cache\ndef table(n): return torch.arange(n) * 1.0", vars(ELSEWHERE))
sys.modules[ELSEWHERE.__name__] = ELSEWHERE
imported = ELSEWHERE.table


class Helper:
    def __init__(self) -> None:
        self.tables: dict[int, torch.Tensor] = {}


class Keeps(nn.Module):
    """Adds a table to its input, which it gets in one of many ways."""

    shared: torch.Tensor | None = None

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.way, self.helper, self.deep = way, Helper(), {"tables": [{}]}
        self.own = functools.cache(make)
        self.register_buffer("buffer", None, persistent=False)
        self.attribute: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + getattr(self, self.way)(6)

    def in_a_function(self, length: int) -> torch.Tensor:
        return cached(length)

    def in_another_file(self, length: int) -> torch.Tensor:
        return imported(length)

    @functools.lru_cache  # noqa: B019
    def in_a_method(self, length: int) -> torch.Tensor:
        return make(length)

    @staticmethod
    @while_not_compiled
    def in_a_closure(length: int) -> torch.Tensor:
        return make(length)

    def in_an_instance(self, length: int) -> torch.Tensor:
        return self.own(length)

    def in_a_global_dict(self, length: int) -> torch.Tensor:
        return KEPT.setdefault(length, make(length))

    def in_a_global(self, length: int) -> torch.Tensor:
        global TABLE
        if TABLE is None:
            TABLE = make(length)
        return TABLE

    def in_a_global_list(self, length: int) -> torch.Tensor:
        if not LIST:
            LIST.append(make(length))
        return LIST[0]

    def in_the_class(self, length: int) -> torch.Tensor:
        if Keeps.shared is None:
            Keeps.shared = make(length)
        return Keeps.shared

    def in_a_new_attribute_of_the_class(self, length: int) -> torch.Tensor:
        if not hasattr(Keeps, "added"):
            Keeps.added = make(length)
        return Keeps.added

    def in_an_attribute(self, length: int) -> torch.Tensor:
        if self.attribute is None:
            self.attribute = make(length)
        return self.attribute

    def in_a_buffer(self, length: int) -> torch.Tensor:
        if self.buffer is None:
            self.register_buffer("buffer", make(length), persistent=False)
        return self.buffer

    def in_an_object(self, length: int) -> torch.Tensor:
        return self.helper.tables.setdefault(length, make(length))

    def deep_inside(self, length: int) -> torch.Tensor:
        return self.deep["tables"][0].setdefault(length, make(length))


WAYS = [name for name in vars(Keeps) if name.startswith(("in_", "deep_"))]


def fakes_within(*roots: Any) -> list[type]:
    """The kinds of fake tensors that can be reached, through anything but other modules' globals and types."""
    pending, seen, found = [*roots], {id(vars(module)) for module in list(sys.modules.values())}, []
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, types.ModuleType):
            continue
        seen.add(id(value))
        if isinstance(value, (FakeTensor, FunctionalTensor, torch.SymInt)):
            found.append(type(value))
        elif not isinstance(value, type):
            pending += gc.get_referents(value)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left(way: str) -> None:
    places = (KEPT, LIST, TABLE, cached, imported, dict(vars(Keeps)))
    model = Keeps(way).eval()
    expected = model.linear(X) + make(6)
    capture(model, X)
    assert torch.equal(model(X), expected)
    assert not fakes_within(model, *places, TABLE, Keeps.shared)
    _forget()


def test_what_a_model_kept_before_stays() -> None:
    model = Keeps("deep_inside").eval()
    expected = model(X)
    kept = model.deep["tables"][0][6]
    capture(model, X)
    assert model.deep == {"tables": [{6: kept}]}
    assert torch.equal(model(X), expected)


def test_nothing_is_left_where_inputs_are_inferred() -> None:
    model = Keeps("in_a_function")
    infer(model)
    assert torch.equal(model(X), model.linear(X) + make(6))
    _forget()


def test_nothing_is_left_by_a_capture_that_fails() -> None:
    class Fails(Keeps):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            return x if x.sum() > 0 else -x

    model = Fails("in_a_function").eval()
    with pytest.raises(CaptureError, match="depends on the values"):
        capture(model, X)
    assert torch.equal(model(X).abs(), (model.linear(X) + make(6)).abs())
    _forget()


def _forget() -> None:
    global TABLE
    TABLE = Keeps.shared = None
    if hasattr(Keeps, "added"):
        del Keeps.added
    KEPT.clear(), LIST.clear(), cached.cache_clear(), imported.cache_clear()
