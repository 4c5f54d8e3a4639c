"""Take away what a run with fake tensors left outside of the modules: in caches, in globals, in objects that they hold.

A fake tensor that a function keeps for its next call breaks that call. Where it is kept is known beforehand: in a
`functools.lru_cache`, in a dict or a list, or under a name, of a class of the model, of the file that defines it, of a
file whose functions that one imports, or of an object that a module holds. Only what holds a fake tensor is undone.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import operator
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

_FAKE = (FakeTensor, FunctionalTensor, torch.SymInt, torch.SymFloat, torch.SymBool)
_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)
_OPAQUE = (*_PLAIN, torch.Tensor, torch.nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType)
# Containers are looked into where their class does nothing of its own when it is read.
_DICTS = frozenset({dict, collections.OrderedDict, collections.defaultdict})
_LISTS = frozenset({list, set, tuple})
# What `torch.nn.Module` itself keeps: children, tensors and hooks.
_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))
_LIBRARIES = frozenset({"torch", "numpy", "builtins"}) | sys.stdlib_module_names
# How many containers and objects deep is looked: into modules, and into classes and files. Longer containers are not.
_DEPTH = 4
_SHALLOW = 2
_LONGEST = 1000

_Cache = functools._lru_cache_wrapper


@contextlib.contextmanager
def nothing_left(model: torch.nn.Module) -> Iterator[None]:
    """At the end, no fake tensor that came about meanwhile is left in what the model's code keeps between calls.

    A `functools.lru_cache` that holds one is emptied; a name, or an element of a dict, gets its earlier value back or
    goes; a list or a set gets its earlier elements back.

    >>> from torch._subclasses.fake_tensor import FakeTensorMode
    >>> class Cached(torch.nn.Module):
    ...     @staticmethod
    ...     @functools.lru_cache
    ...     def table(length):
    ...         return torch.arange(length)
    ...     def forward(self, x):
    ...         return x + self.table(x.shape[1])
    >>> model = Cached()
    >>> with nothing_left(model), FakeTensorMode():
    ...     kind = type(model(torch.zeros(2, 3))).__name__
    >>> kind, model(torch.zeros(2, 3)).tolist()
    ('FakeTensor', [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    """
    places = _Places()
    for module in model.modules():
        places.hold(module.__dict__, module, _DEPTH)
    for kind in {base for module in model.modules() for base in type(module).__mro__ if not _of_library(base)}:
        places.visit_class(kind)
    try:
        yield
    finally:
        places.clear()


class _Places:
    """Where code keeps things between calls, with what was there."""

    def __init__(self) -> None:
        self.names: list[tuple[Any, Mapping[Any, Any], dict[Any, Any]]] = []
        self.elements: list[tuple[list[Any] | set[Any], list[Any]]] = []
        self.caches: dict[_Cache[Any], int] = {}
        self._seen: set[int] = set()

    def visit_class(self, kind: type) -> None:
        """The class, the file that defines it and, if it has a forward, the files of functions imported there."""
        self.hold(vars(kind), kind, _SHALLOW)
        file = sys.modules.get(kind.__module__)
        if file is None or id(vars(file)) in self._seen:
            return
        self.hold(vars(file), file, _SHALLOW)
        for value in list(vars(file).values()) if "forward" in vars(kind) else ():
            if isinstance(value, (types.FunctionType, _Cache)) and not _of_library(value):
                other = sys.modules.get(value.__module__)
                if other is not None:
                    self.hold(vars(other), other, _SHALLOW)

    def hold(self, names: Mapping[Any, Any], owner: Any, depth: int) -> None:
        """Remember what the names of an owner, or the keys of a dict, stand for, and what lies in there."""
        if id(names) in self._seen:
            return
        self._seen.add(id(names))
        self.names.append((owner, names, dict(names)))
        for name, value in list(names.items()):
            if name not in _OF_EVERY_MODULE:
                self._visit(value, depth - 1)

    def _visit(self, value: Any, depth: int) -> None:
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, types.FunctionType):
            for cell in _closed_over(value):
                if isinstance(cell, _Cache):
                    self.caches[cell] = cell.cache_info().misses
        elif isinstance(value, _Cache):
            self.caches[value] = value.cache_info().misses
        elif depth and not isinstance(value, _OPAQUE):
            self._look_into(value, depth)

    def _look_into(self, value: Any, depth: int) -> None:
        kind = type(value)
        if kind in _DICTS or kind in _LISTS:
            if len(value) > _LONGEST or id(value) in self._seen:
                return
            if kind in _DICTS:
                self.hold(value, value, depth)
                return
            self._seen.add(id(value))
            if kind is not tuple:
                self.elements.append((value, list(value)))
            for element in list(value):
                self._visit(element, depth - 1)
        elif (names := _names_of(value)) is not None:
            self.hold(names, value, depth)

    def clear(self) -> None:
        """Take away what holds a fake tensor and was not there before."""
        for owner, names, before in self.names:
            for name, value in list(names.items()):
                if before.get(name, before) is not value and _holds_fake(value):
                    _put_back(owner, names, name, before)
        for container, elements in self.elements:
            changed = len(container) != len(elements) or any(map(operator.is_not, container, elements))
            if changed and _holds_fake(container):
                container.clear()
                container.extend(elements) if isinstance(container, list) else container.update(elements)
        for cache, misses in self.caches.items():
            if cache.cache_info().misses != misses and any(map(_holds_fake, gc.get_referents(cache))):
                cache.cache_clear()


def _holds_fake(value: Any, depth: int = _DEPTH) -> bool:
    """Whether a value is a fake tensor, or a free size, or holds one."""
    if isinstance(value, _FAKE):
        return True
    if isinstance(value, _OPAQUE) or not depth:
        return False
    if type(value) in _DICTS or type(value) in _LISTS:
        elements = value.values() if type(value) in _DICTS else value
        return len(value) <= _LONGEST and any(_holds_fake(element, depth - 1) for element in elements)
    names = _names_of(value)
    return names is not None and _holds_fake(names, depth)


def _names_of(value: Any) -> dict[str, Any] | None:
    """The attributes of an object of a class that no library defines."""
    names = None
    if not _of_library(type(value)):
        with contextlib.suppress(AttributeError):
            names = object.__getattribute__(value, "__dict__")
    return names if type(names) is dict else None


def _put_back(owner: Any, names: Mapping[Any, Any], name: Any, before: Mapping[Any, Any]) -> None:
    """Give one name of an owner its earlier value, or take it away."""
    if isinstance(names, dict):
        if name in before:
            names[name] = before[name]
        else:
            del names[name]
    elif name in before:
        setattr(owner, name, before[name])
    else:
        delattr(owner, name)


def _closed_over(function: types.FunctionType) -> Iterator[Any]:
    """What a function finds in its closure, such as the one that a decorator wraps."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            yield cell.cell_contents


def _of_library(thing: Any) -> bool:
    """Whether a class or a function is one of Python, of torch or of NumPy."""
    return str(getattr(thing, "__module__", None) or "builtins").partition(".")[0] in _LIBRARIES
