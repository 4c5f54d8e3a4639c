"""Example inputs: what a person passes, checked against the model's `forward` and brought into one form."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.export import ExportedProgram

from ..errors import InputError
from .infer import describe_forward, infer_arguments, signature_of

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Inputs(NamedTuple):
    """The arguments of one call: ``model(*args, **kwargs)``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def normalise(model: torch.nn.Module, example_inputs: Any = None) -> Inputs:
    """Example inputs as the arguments of a call that fits the model's `forward`.

    Arguments:
        model: the module to be called.
        example_inputs: a tensor (the only positional argument), a tuple of positional arguments, a mapping of keyword
            arguments (a dict, a tokenizer's output), `Inputs`, or None to infer them.

    Returns:
        The arguments, keywords in the order of the signature. What was passed is not changed.

    Raises:
        InputError: of another kind, or not what `forward` takes.

    >>> normalise(torch.nn.Linear(4, 4), {"input": 1.0})
    Inputs(args=(), kwargs={'input': 1.0})
    """
    check_model(model)
    if example_inputs is None:
        return infer(model)
    inputs = _as_call(model, example_inputs)
    signature = signature_of(model)
    _check_names(model, signature, inputs)
    _check_counts(model, signature, inputs)
    order = [*signature.parameters, *inputs.kwargs]
    return Inputs(inputs.args, dict(sorted(inputs.kwargs.items(), key=lambda item: order.index(item[0]))))


def check_model(model: Any, role: str = "model") -> None:
    """Raise where something is no module, such as a class that was not called, or the name of a model.

    >>> check_model(torch.nn.Linear)
    Traceback (most recent call last):
    fxreuse.errors.InputError: model: expected a torch.nn.Module, found the class Linear; make one by calling the class
    """
    if isinstance(model, torch.jit.ScriptModule):
        found, remedy = f"a scripted {model.original_name}", "pass the module that it was scripted from"
    elif isinstance(model, torch.nn.Module):
        return
    elif isinstance(model, type):
        found, remedy = f"the class {model.__name__}", "make one by calling the class"
    elif isinstance(model, str):
        found, remedy = f"the string {model!r}", "load the model first"
    elif isinstance(model, ExportedProgram):
        found, remedy = "an exported program", "pass the model that it was exported from"
    elif callable(model):
        found, remedy = f"a {type(model).__name__}", "wrap it in a torch.nn.Module whose forward calls it"
    else:
        found, remedy = f"a {type(model).__name__}", "pass the model itself"
    raise InputError(f"{role}: expected a torch.nn.Module, found {found}; {remedy}")


def bind(model: torch.nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The arguments of a call by their names in `forward`, in the order of its signature; defaults are left out.

    What goes into ``*args`` comes as one tuple under that name; what goes into ``**kwargs`` under its own names.

    >>> bind(torch.nn.Bilinear(2, 3, 4), Inputs((1.0,), {"input2": 2.0}))
    {'input1': 1.0, 'input2': 2.0}
    """
    signature = signature_of(model)
    try:
        arguments = signature.bind(*inputs.args, **inputs.kwargs).arguments
    except TypeError as error:
        raise _error(model, signature, str(error)) from error
    bound: dict[str, Any] = {}
    for name, value in arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(value)
        else:
            bound[name] = value
    return bound


def infer(model: torch.nn.Module) -> Inputs:
    """Example inputs for a model, from what it says of itself, or else from what runs on fake tensors.

    Hugging Face models say it in ``main_input_name`` and their configuration, `torch.nn.Transformer` and its parts in
    their width; any other model is tried, if it needs one tensor. Batches have 2 rows, and sizes are small and differ.
    Neither the model nor the state of random numbers is changed.

    Raises:
        InputError: nothing runs, or more is needed than can be guessed; it says what to pass.

    >>> infer(torch.nn.Linear(6, 3)).kwargs["input"].shape
    torch.Size([2, 7, 6])
    """
    return Inputs((), infer_arguments(model))


def _as_call(model: torch.nn.Module, given: Any) -> Inputs:
    if isinstance(given, Inputs):
        return given
    if isinstance(given, torch.Tensor):
        return Inputs((given,), {})
    if isinstance(given, tuple):
        return Inputs(given, {})
    if not isinstance(given, Mapping):
        raise InputError(
            f"example_inputs of {type(model).__name__}: expected a tensor, a tuple of positional arguments or a dict "
            f"of keyword arguments, found {type(given).__name__}; {_remedy(model, given)}"
        )
    nameless = [key for key in given if not isinstance(key, str)]
    if nameless:
        raise InputError(
            f"example_inputs of {type(model).__name__}: expected argument names as keys, found {nameless[0]!r}; "
            "where forward takes a dict, pass it in a tuple: (inputs,)"
        )
    return Inputs((), dict(given))


def _remedy(model: torch.nn.Module, given: Any) -> str:
    if not isinstance(given, list):
        return describe_forward(signature_of(model))
    if given and all(isinstance(item, torch.Tensor) for item in given):
        return "pass tuple(inputs) for positional arguments, or (inputs,) where forward takes a list"
    return "pass torch.tensor(inputs) for one tensor, or (inputs,) where forward takes a list"


def _check_names(model: torch.nn.Module, signature: inspect.Signature, inputs: Inputs) -> None:
    """Every keyword is one that `forward` takes, and none repeats a positional argument."""
    parameters = signature.parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in _NAMED]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    unknown = [] if takes_any else [name for name in inputs.kwargs if name not in names]
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise _error(model, signature, f"unknown {_list(unknown)}{hint}")
    positional = [parameter.name for parameter in parameters if parameter.kind in _POSITIONAL]
    twice = [name for name in positional[: len(inputs.args)] if name in inputs.kwargs and name in names]
    if twice:
        raise _error(model, signature, f"both positional and by name: {_list(twice)}")


def _check_counts(model: torch.nn.Module, signature: inspect.Signature, inputs: Inputs) -> None:
    """No argument is missing, and none is left over."""
    parameters = signature.parameters.values()
    positional = [parameter.name for parameter in parameters if parameter.kind in _POSITIONAL]
    variadic = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    if len(inputs.args) > len(positional) and not variadic:
        found = f"expected at most {len(positional)} positional, found {len(inputs.args)}"
        raise _error(model, signature, found)
    given = {*positional[: len(inputs.args)], *inputs.kwargs}
    missing = [
        parameter.name
        for parameter in parameters
        if parameter.kind in (*_POSITIONAL, *_NAMED)
        and parameter.default is inspect.Parameter.empty
        and parameter.name not in given
    ]
    if missing:
        known = [name for name in given if name in signature.parameters]
        dict_at_once = inputs.kwargs and not known
        hint = " (where forward takes a dict, pass it in a tuple: (inputs,))" if dict_at_once else ""
        raise _error(model, signature, f"missing {_list(missing)}, found {_list([*given]) or 'nothing'}{hint}")


def _error(model: torch.nn.Module, signature: inspect.Signature, reason: str) -> InputError:
    return InputError(f"example_inputs of {type(model).__name__}: {reason}; {describe_forward(signature)}")


def _list(names: list[str]) -> str:
    return ", ".join(map(repr, names))
