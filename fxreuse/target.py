"""``target=``: capture one submodule with what its host gives it, and replace it in place."""

from __future__ import annotations

from typing import Any

import torch

from .capture import caches_off, eval_mode
from .errors import InputError, UnsupportedError
from .inputs import Inputs, normalise
from .untouched import untouched


class _Reached(Exception):
    """Raised by the hook to stop the host once the submodule's inputs are known."""


def captured_inputs(model: torch.nn.Module, target: str, example_inputs: Any) -> tuple[torch.nn.Module, Inputs]:
    """The submodule at a path, and the arguments that it receives when the host runs once on the example inputs.

    Raises:
        InputError: where there is no such submodule.
        UnsupportedError: where the host does not call it.
    """
    inner = _submodule(model, target)
    received: list[Inputs] = []

    def record(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        received.append(Inputs(args, kwargs))
        raise _Reached

    inputs = normalise(model, example_inputs)
    handle = inner.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with untouched(model), eval_mode(model), caches_off(model), torch.no_grad():
            model(*inputs.args, **inputs.kwargs)
    except _Reached:
        return inner, _without_caches(received[0])
    finally:
        handle.remove()
    raise UnsupportedError(
        f"{type(model).__name__} does not call {target!r} on these example_inputs, so its inputs are not known. "
        "Pass example_inputs that reach it, or name another target."
    )


def _without_caches(inputs: Inputs) -> Inputs:
    """Arguments that are neither tensors nor plain values (key-value caches) are left at their defaults."""
    plain = (torch.Tensor, bool, int, float, str, tuple, list, dict, type(None))
    return Inputs(inputs.args, {name: value for name, value in inputs.kwargs.items() if isinstance(value, plain)})


def _submodule(model: torch.nn.Module, target: str) -> torch.nn.Module:
    try:
        return model.get_submodule(target)
    except AttributeError:
        known = [path for path, _ in model.named_modules() if path and path.count(".") <= target.count(".")]
        raise InputError(
            f"{type(model).__name__} has no submodule {target!r}. Submodules at that depth: {', '.join(known[:20])}."
        ) from None


def replace_submodule(model: torch.nn.Module, target: str, new: torch.nn.Module) -> torch.nn.Module:
    """Put a module in the place of a submodule; returns the host."""
    owner, _, name = target.rpartition(".")
    model.get_submodule(owner).register_module(name, new)
    return model
