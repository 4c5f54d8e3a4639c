"""The forward of a rewritten model: the original's signature in front of a function of the tensor leaves."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..program import Argument, CallingConvention, Leaf

if TYPE_CHECKING:
    from .rewritten import Rewritten

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def make_forward(module: Rewritten, convention: CallingConvention, name: str) -> Callable[..., Any]:
    """A forward with the original's signature for ``module``, which it does not keep alive.

    The source is generated, so that ``inspect.signature`` and `torch.compile` see plain parameters.
    """
    signature = inspect.Signature(convention.parameters)
    seen = {argument.name: argument for argument in convention.arguments}
    scope: dict[str, Any] = {"_owner": weakref.ref(module), "_leaves": _leaves, "_refuse": _refuse, "_model": name}
    scope |= {"_refuse_all": _refuse_all, "_accepted": convention.accepted}
    extra = {name: f"_extra{i}" for i, name in enumerate(seen) if name not in signature.parameters}
    scope |= {key: seen[name] for name, key in extra.items()}
    parameters, lines = [], []
    keyword_only = False
    for index, parameter in enumerate(signature.parameters.values()):
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            if not any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
                parameters.append("*")
        parameters.append(_declare(parameter, index, scope))
        argument = seen.get(parameter.name)
        scope[f"_argument{index}"] = argument
        scope[f"_accepted{index}"] = convention.accepted.get(parameter.name, (parameter.default,))
        if argument is not None:
            lines.append(f"    leaves += _leaves(_model, _argument{index}, {parameter.name})")
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if parameter.kind is parameter.VAR_KEYWORD:
                taken = [(key, f"{parameter.name}.pop({name!r}, None)") for name, key in extra.items()]
                lines += [f"    leaves += _leaves(_model, {key}, {value})" for key, value in taken]
            lines.append(f"    _refuse_all(_model, {parameter.name}, _accepted)")
        else:
            lines.append(f"    _refuse(_model, {parameter.name!r}, {parameter.name}, _accepted{index})")
    source = "\n".join(
        [f"def forward({', '.join(parameters)}):", "    leaves = ()", *lines, "    return _owner().run(leaves)"]
    )
    exec(source, scope)
    annotated = {p.name: p.annotation for p in convention.parameters if p.annotation is not p.empty}
    scope["forward"].__annotations__ = annotated
    return scope["forward"]


def _declare(parameter: inspect.Parameter, index: int, scope: dict[str, Any]) -> str:
    if parameter.kind is parameter.VAR_POSITIONAL:
        return f"*{parameter.name}"
    if parameter.kind is parameter.VAR_KEYWORD:
        return f"**{parameter.name}"
    if parameter.default is parameter.empty:
        return parameter.name
    scope[f"_default{index}"] = parameter.default
    return f"{parameter.name}=_default{index}"


def _leaves(model: str, argument: Argument, value: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of an argument that the capture saw; what is not a tensor has to be what it was."""
    if len(argument.leaves) == 1 and isinstance(argument.leaves[0], Leaf) and argument.spec.is_leaf():
        if not isinstance(value, torch.Tensor):
            raise InputError(_wanted(model, argument.name, "a tensor", value))
        return (value,)
    flat, spec = pytree.tree_flatten(value)
    if spec != argument.spec:
        raise InputError(_wanted(model, argument.name, f"the structure {argument.spec}", value))
    for expected, found in zip(argument.leaves, flat, strict=True):
        if isinstance(expected, Leaf):
            if not isinstance(found, torch.Tensor):
                raise InputError(_wanted(model, expected.name, "a tensor", found))
        elif not _same(found, expected):
            raise InputError(_wanted(model, argument.name, f"{expected!r}, the value of the capture", found))
    return tuple(leaf for leaf, e in zip(flat, argument.leaves, strict=True) if isinstance(e, Leaf))


def _refuse(model: str, name: str, value: Any, accepted: tuple[Any, ...]) -> None:
    """Refuse an argument that the capture did not see, unless it says what was captured."""
    if any(_same(value, choice) for choice in accepted):
        return
    raise InputError(
        f"{model}: the argument {name} was not there when the model was captured, so the graph does not know it "
        f"(found {_show(value)}). Apply the plan again with {name} in example_inputs, or leave it out."
    )


def _refuse_all(model: str, values: dict[str, Any] | tuple[Any, ...], accepted: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse what came in by ``*args`` or ``**kwargs``, unless it says what was captured."""
    if isinstance(values, tuple):
        values = {f"at position {index} of *args": value for index, value in enumerate(values)}
    for name, value in values.items():
        _refuse(model, name, value, accepted.get(name, ()))


def _same(value: Any, other: Any) -> bool:
    if value is other:
        return True
    plain = (bool, int, float, str)
    return isinstance(value, plain) and type(value) is type(other) and value == other


def _wanted(model: str, name: str, expected: str, found: Any) -> str:
    return (
        f"{model}: {name} must be {expected}, as when the model was captured; found {_show(found)}. "
        "Pass it, or apply the plan again with the example_inputs that you want to use."
    )


def _show(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
