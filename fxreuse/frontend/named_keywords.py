"""What goes into ``**kwargs``, as arguments with names of their own, for export to free their sizes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def named_keywords(model: torch.nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let the model's forward name the keyword arguments that it takes by ``**kwargs``, for the time being.

    `torch.export` (2.11 to 2.13) describes the arguments of a call in two ways that contradict each other where some of
    them go into ``**kwargs``, and refuses every description of their free sizes.

    >>> class Model(torch.nn.Module):
    ...     def forward(self, x, **options): ...
    >>> model = Model()
    >>> with named_keywords(model, ["x", "scale"]):
    ...     print(inspect.signature(model.forward))
    (x, *, scale)
    """
    signature = inspect.signature(model.forward)
    kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    extra = [name for name in names if name not in {p.name for p in kept}]
    if not extra:
        yield
        return
    forward, before = model.forward, dict(model.__dict__)

    @functools.wraps(forward)
    def named(*args: object, **kwargs: object) -> object:
        return forward(*args, **kwargs)

    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    named.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    model.__dict__["forward"] = named
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if "forward" in before:
            model.__dict__["forward"] = before["forward"]
