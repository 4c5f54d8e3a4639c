"""Run a model as often as one likes and leave no trace in it."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch

from .leftovers import nothing_left

_CONTAINERS = (dict, list, set)


@contextlib.contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Put everything back at the end: attributes, modes and buffers of all modules, and the random number generators.

    Attributes that are lists, dicts or sets get their elements back; what lies deeper, and parameters, are not copied.
    Fake tensors are taken out of it, and out of what the model's code keeps elsewhere (see `leftovers`).

    >>> model = torch.nn.BatchNorm1d(4)
    >>> with untouched(model):
    ...     _ = model(torch.randn(8, 4)), model.eval()
    >>> model.training, int(model.num_batches_tracked)
    (True, 0)
    """
    modules = list(model.modules())
    attributes = [(module, dict(module.__dict__)) for module in modules]
    values = [value for module in modules for value in (*module.__dict__.values(), *module._buffers.values())]
    containers = [(value, copy.copy(value) if value else ()) for value in values if isinstance(value, _CONTAINERS)]
    tensors = [(value, value.detach().clone()) for value in values if isinstance(value, torch.Tensor)]
    try:
        with nothing_left(model), _generators_kept(model):
            yield
    finally:
        for module, before in attributes:
            module.__dict__.clear()
            module.__dict__.update(before)
        for container, elements in containers:
            container.clear()
            container.extend(elements) if isinstance(container, list) else container.update(elements)
        with torch.no_grad():
            for tensor, value in tensors:
                if not tensor.is_meta and not torch.equal(tensor, value):
                    tensor.copy_(value)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection meanwhile, where it was on.

    A capture makes a great many objects that nearly all stay. Going through all objects of the process, over and over,
    to find that out takes a tenth of its time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _generators_kept(model: torch.nn.Module) -> Iterator[None]:
    """The random number generators of torch, Python and NumPy put back at the end."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    state = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def one_module_per_path(model: torch.nn.Module) -> Iterator[None]:
    """Give every further path of a module that is registered several times a module of its own, with the same state.

    `torch.export` names a module call by the path that it was reached by; a hook knows only the module.

    >>> model = torch.nn.Sequential(*[torch.nn.GELU()] * 2)
    >>> with one_module_per_path(model):
    ...     [path for path, _ in model.named_children()]
    ['0', '1']
    """
    replaced: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []
    seen = {model}

    def visit(module: torch.nn.Module, around: frozenset[torch.nn.Module]) -> None:
        for name, child in module._modules.items():
            if child is None or child in around:
                continue
            original = child
            if child in seen:
                replaced.append((module, name, child))
                child = module._modules[name] = _twin(child)
            seen.add(child)
            visit(child, around | {original})

    try:
        visit(model, frozenset({model}))
        yield
    finally:
        for owner, name, child in replaced:
            owner._modules[name] = child


def _twin(module: torch.nn.Module) -> torch.nn.Module:
    """A module with the same attributes, but hooks and a list of children of its own."""
    twin: torch.nn.Module = object.__new__(type(module))
    for name, value in module.__dict__.items():
        own = isinstance(value, dict) and (name == "_modules" or "_hooks" in name)
        twin.__dict__[name] = copy.copy(value) if own else value
    return twin
