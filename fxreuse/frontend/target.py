"""``target=``: capture one submodule with what its host gives it, and replace it in place."""

from __future__ import annotations

import copy
import difflib
import inspect
import linecache
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.export import ExportedProgram
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from ..errors import InputError, UnsupportedError
from .capture import caches_off, eval_mode
from .inputs import Inputs, check_model, normalise
from .untouched import untouched

_LISTED = 8


class _Call(NamedTuple):
    """One call of the submodule: its arguments, and the line of the host that made it."""

    inputs: Inputs
    line: str


class _Run(NamedTuple):
    """One run of the host: the calls of the submodule, the modules that were called, and the error that ended it."""

    calls: list[_Call]
    called: set[torch.nn.Module]
    error: Exception | None


def captured_inputs(
    model: torch.nn.Module | ExportedProgram, target: str, example_inputs: Any
) -> tuple[torch.nn.Module, Inputs]:
    """The submodule at a path, and the arguments that it receives when the host runs once on the example inputs.

    The host runs to its end, to see whether it calls the submodule again. Where it fails after the call (a decoder
    that misses its inputs), what the submodule received still holds. Nothing of it is changed, nor is what was passed.

    Raises:
        InputError: where there is no such submodule, or the host fails on the example inputs before it calls it.
        UnsupportedError: where the host does not call it, or calls it several times.
    """
    if isinstance(model, ExportedProgram):
        raise UnsupportedError(
            f"target={target!r} needs the model itself: an exported program has no submodules to replace. "
            "Pass the model, or leave target= out to take the whole program."
        )
    check_model(model)
    inner = _submodule(model, target)
    inputs = normalise(model, example_inputs)
    run = _run(model, inner, Inputs(*_copied((inputs.args, inputs.kwargs))))
    if len(run.calls) == 1:
        return inner, _without_caches(run.calls[0].inputs)
    if run.calls:
        raise UnsupportedError(_several(model, target, run.calls))
    if run.error is not None:
        raise InputError(
            f"{_name(model)} itself fails on these example_inputs before it calls {target!r}: {_said(run.error)}"
            f"{_line_of(run.error)}. Pass example_inputs that it accepts; its forward takes "
            f"{inspect.signature(model.forward)}."
        ) from run.error
    raise UnsupportedError(_never(model, target, inner, run.called))


def replace_submodule(model: torch.nn.Module, target: str, new: torch.nn.Module) -> torch.nn.Module:
    """Put a module in the place of a submodule, under every name that it has; returns the host.

    The new module takes over the plain attributes that the host may read of it, such as a configuration.
    """
    old = model.get_submodule(target)
    for name, value in vars(old).items():
        if not name.startswith("_") and name not in vars(new) and not hasattr(type(new), name):
            new.__dict__[name] = value
    places = [(owner, name) for owner in model.modules() for name, child in owner._modules.items() if child is old]
    for owner, name in places:
        owner._modules[name] = new
    return model


def _submodule(model: torch.nn.Module, target: str) -> torch.nn.Module:
    """The submodule at a path.

    Raises:
        InputError: it is no path, or leads to nothing, to what is no module, or to the model itself.
    """
    if not isinstance(target, str):
        raise InputError(
            f"target= takes the path of a submodule of {_name(model)}, such as 'model.encoder', "
            f"found {type(target).__name__}"
        )
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    try:
        inner = model.get_submodule(target)
    except AttributeError:
        near = [path for path in paths if path.endswith(f".{target}")] or difflib.get_close_matches(target, paths, n=3)
        depth = target.count(".")
        there = list(dict.fromkeys(".".join(path.split(".")[: depth + 1]) for path in paths))
        hint = f"did you mean {' or '.join(map(repr, near[:3]))}?" if near else f"there is {_listed(there)}"
        what = "no submodule" if not _leads_somewhere(model, target) else "something that is no module at"
        raise InputError(f"{_name(model)} has {what} {target!r}; {hint}") from None
    if inner is model:
        raise InputError(
            f"target={target!r} is {_name(model)} itself; leave target= out to capture all of it, or name a part: "
            f"{_listed([path for path in paths if '.' not in path])}"
        )
    if all(inner is not part for part in model.modules()):
        raise UnsupportedError(
            f"{_name(model)} does not register {target!r} as a submodule, so it cannot be replaced; "
            f"register it, or name one of {_listed([path for path in paths if '.' not in path])}"
        )
    return inner


def _leads_somewhere(model: torch.nn.Module, target: str) -> bool:
    value: Any = model
    for part in target.split("."):
        value = getattr(value, part, None)
    return value is not None


def _run(model: torch.nn.Module, inner: torch.nn.Module, inputs: Inputs) -> _Run:
    """Run the host once, and watch what it calls."""
    run = _Run([], set(), None)

    def record(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run.calls.append(_Call(Inputs(*_copied((args, kwargs))), _caller()))

    called = register_module_forward_pre_hook(lambda module, _: run.called.add(module))
    try:
        with untouched(model), eval_mode(model), caches_off(model), torch.no_grad(), _watched(inner, record):
            model(*inputs.args, **inputs.kwargs)
    except Exception as error:
        return run._replace(error=error)
    finally:
        called.remove()
    return run


@contextmanager
def _watched(module: torch.nn.Module, record: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Record every call of a module's forward, also one that goes past its hooks (``host.encoder.forward(x)``)."""
    before = dict(module.__dict__)
    forward = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        record(args, kwargs)
        return forward(*args, **kwargs)

    module.__dict__["forward"] = watched
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if "forward" in before:
            module.__dict__["forward"] = before["forward"]


def _copied(value: Any) -> Any:
    """The same structure with copies of its tensors and containers: hosts write into what they are given."""

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().clone().requires_grad_(leaf.requires_grad)
        if not isinstance(leaf, Mapping):
            return leaf
        twin: Any = copy.copy(leaf)
        twin.update({key: _copied(item) for key, item in leaf.items()})
        return twin

    return pytree.tree_map(copied, value)


def _without_caches(inputs: Inputs) -> Inputs:
    """Arguments that are neither tensors nor plain values (key-value caches) are left at their defaults."""
    plain = (torch.Tensor, bool, int, float, str, tuple, list, dict, type(None))
    return Inputs(inputs.args, {name: value for name, value in inputs.kwargs.items() if isinstance(value, plain)})


def _several(model: torch.nn.Module, target: str, calls: list[_Call]) -> str:
    """Why several calls cannot be served, with the lines that make them and what they pass."""
    shown = [f"{call.line} with {_shapes(call.inputs)}" for call in calls[:_LISTED]]
    more = f", and {len(calls) - _LISTED} more" if len(calls) > _LISTED else ""
    return (
        f"{_name(model)} calls {target!r} {len(calls)} times in one forward: {'; '.join(shown)}{more}. "
        "A capture follows one call, and what it fixes may not hold for the others. Name a target that is called once, "
        f"such as the module around those calls; or rewrite it by itself, on inputs of your choice: "
        f"fxreuse.apply(model.{target}, plan, inputs)."
    )


def _never(model: torch.nn.Module, target: str, inner: torch.nn.Module, called: set[torch.nn.Module]) -> str:
    """Where the host's forward is, and which modules it does call."""
    paths = {module: path for path, module in model.named_modules() if path}
    inside = [path for module, path in paths.items() if module in called and path.startswith(f"{target}.")]
    around = [path for module, path in paths.items() if module in called and target.startswith(f"{path}.")]
    told = (
        f"{_name(model)} does not call {target!r} on these example_inputs (its forward is at {_definition(model)}), "
        "so what it receives is not known."
    )
    if inside and around:
        return (
            f"{told} It is a {type(inner).__name__} whose parts are called one by one, such as {inside[0]!r}: "
            f"name the module that calls them, {around[-1]!r}."
        )
    if inside:
        return f"{told} Its parts are called one by one: leave target= out, or name one of {_listed(inside)}."
    others = [path for module, path in paths.items() if module in called and path.count(".") <= target.count(".")]
    return f"{told} Pass example_inputs that reach it, or name a target that is called: {_listed(others)}."


def _shapes(inputs: Inputs) -> str:
    leaves = [leaf for leaf in pytree.tree_leaves(tuple(inputs)) if isinstance(leaf, torch.Tensor)]
    return ", ".join("×".join(map(str, leaf.shape)) or "a number" for leaf in leaves) or "no tensor"


def _caller() -> str:
    """The line that made the call which is being recorded: the innermost one that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_plumbing(frame.f_code.co_filename):
        frame = frame.f_back
    return _shown(frame.f_code.co_filename, frame.f_lineno)


def _line_of(error: Exception) -> str:
    """The line that an error comes from, in brackets; nothing where all lines are torch's."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not _is_plumbing(name):
            place = f" ({_shown(name, trace.tb_lineno)})"
        trace = trace.tb_next
    return place


def _is_plumbing(filename: str) -> bool:
    return "/torch/" in filename or "/fxreuse/" in filename or filename.startswith("<")


def _shown(filename: str, number: int) -> str:
    code = linecache.getline(filename, number).strip()
    return f"{filename}:{number}" + (f": {code}" if code else "")


def _definition(model: torch.nn.Module) -> str:
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return "an unknown place" if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
    return (", ".join(map(repr, paths[:_LISTED])) or "nothing else") + more


def _name(model: torch.nn.Module) -> str:
    return type(model).__name__
