"""The arguments of a `torch.export.ExportedProgram`: their names and structure, from its own example or a given one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..errors import InputError
from .inputs import Inputs


def arguments_of(exported: ExportedProgram, example_inputs: Any = None) -> tuple[dict[str, Any], inspect.Signature]:
    """Example values of the arguments by name, and a signature with these names; a program keeps no defaults.

    Arguments:
        exported: the program.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, of the structure that the
            program was exported with; where left out, the program's own.

    Raises:
        InputError: the program has no example of its own and none is given, or one of another structure is.

    >>> exported = torch.export.export(torch.nn.Linear(2, 3), (torch.randn(4, 2),))
    >>> arguments_of(exported)[1]
    <Signature (input)>
    """
    spec = exported.call_spec.in_spec
    names = list(exported.module_call_graph[0].signature.forward_arg_names or ())
    if example_inputs is not None:
        args, kwargs = _given(example_inputs, names, spec)
    elif exported.example_inputs is not None:
        args, kwargs = exported.example_inputs
    else:
        raise InputError(
            "the exported program keeps no example inputs; pass example_inputs, a tuple of its arguments"
            f"{_named(names)}"
        )
    if len(names) < len(args) + len(kwargs):
        names = [f"arg{index}" for index in range(len(args))] + list(kwargs)
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return bound, inspect.Signature([inspect.Parameter(name, kind) for name in bound])


def _given(example_inputs: Any, names: list[str], spec: pytree.TreeSpec) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a person passed, as positional and keyword arguments of the program."""
    args, kwargs = _as_call(example_inputs, names)
    positional, keywords = spec.children()
    by_name = [name for name in names[: positional.num_children] if name in kwargs]
    args = (*args, *(kwargs.pop(name) for name in by_name))
    kwargs = {name: kwargs[name] for name in keywords.context if name in kwargs} | kwargs
    if pytree.tree_structure((args, kwargs)) != spec:
        raise InputError(
            f"the exported program takes arguments of the structure that it was exported with{_named(names)}; found "
            f"{len(args)} positional, and by name {', '.join(map(repr, (*by_name, *kwargs))) or 'none'}. Leave "
            "example_inputs out to take its own."
        )
    return args, kwargs


def _as_call(given: Any, names: list[str]) -> Inputs:
    if isinstance(given, Inputs):
        return Inputs(given.args, dict(given.kwargs))
    if isinstance(given, torch.Tensor):
        return Inputs((given,), {})
    if isinstance(given, tuple):
        return Inputs(given, {})
    if isinstance(given, Mapping) and all(isinstance(name, str) for name in given):
        return Inputs((), dict(given))
    raise InputError(
        "example_inputs of the exported program: expected a tensor, a tuple of positional arguments or a dict of "
        f"keyword arguments{_named(names)}, found {type(given).__name__}"
    )


def _named(names: list[str]) -> str:
    return f" ({', '.join(names)})" if names else ""
