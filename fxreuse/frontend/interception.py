"""Watching an eager model run: which module call is running, and which softmax or fused attention is called.

The names are those that a captured graph has: the innermost module call, and the number of the softmax in it.
"""

from __future__ import annotations

import dataclasses
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

SiteKey = tuple[str, int]

_ATEN = torch.ops.aten
FUSED = frozenset({F.scaled_dot_product_attention, _ATEN.scaled_dot_product_attention})
SOFTMAXES = frozenset(
    {F.softmax, torch.softmax, torch._softmax, torch.Tensor.softmax, torch.special.softmax}
    | {_ATEN.softmax, _ATEN._softmax, _ATEN._safe_softmax, _ATEN.special_softmax}
)
_OVERRIDE_CHECKS = frozenset({"has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"})


@dataclasses.dataclass
class _ModuleCall:
    """A module call that is running: its path with and without the number of the call, and the sites met in it."""

    module: torch.nn.Module
    name: str
    path: str
    sites: int = 0


class RunningModules:
    """The stack of the running module calls of a model, kept by hooks; ``begin`` is called as a forward begins."""

    def __init__(self, model: torch.nn.Module, begin: Callable[[], None]) -> None:
        self._names: dict[torch.nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(module, []).append(name)
        self._begin = begin
        self._handles: list[RemovableHandle] = []
        self._stack: list[_ModuleCall] = []
        self._calls: Counter[str] = Counter()

    def watch(self) -> None:
        """Put the hooks in place."""
        self._stack.clear()
        for module in self._names:
            self._handles.append(module.register_forward_pre_hook(self._entered, prepend=True))
            self._handles.append(module.register_forward_hook(self._left, always_call=True))

    def release(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def next_site(self) -> SiteKey | None:
        """The key of the softmax or fused attention that is being called; None outside of any module call."""
        if not self._stack:
            return None
        call = self._stack[-1]
        call.sites += 1
        return call.path, call.sites - 1

    def _entered(self, module: torch.nn.Module, _: Any) -> None:
        if not self._stack:
            self._calls.clear()
            self._begin()
        above = f"{self._stack[-1].name}." if self._stack and self._stack[-1].name else ""
        names = [name for name in self._names[module] if name.startswith(above)] or self._names[module]
        name = min(names, key=self._calls.__getitem__)
        number = self._calls[name]
        self._calls[name] += 1
        self._stack.append(_ModuleCall(module, name, f"{name}@{number}" if number else name))

    def _left(self, module: torch.nn.Module, *_: Any) -> None:
        while self._stack and self._stack.pop().module is not module:
            pass


class Intercept(TorchFunctionMode):
    """Hands softmaxes and fused attentions to their handlers, and enters the functions that are composed of them."""

    def __init__(self, softmax: Callable[..., torch.Tensor], fused: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._softmax = softmax
        self._fused = fused

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operator = getattr(func, "overloadpacket", func)
        if operator in FUSED:
            return self._fused(func, args, kwargs)
        if operator in SOFTMAXES:
            return self._softmax(func, args, kwargs)
        body = _body(func)
        if body is None:
            return func(*args, **kwargs)
        with self:
            return body(*args, **kwargs)


def _body(function: Any) -> Callable[..., Any] | None:
    """What a composite Python function does after it asked for overrides; None for any other function.

    A mode is off while it handles a call, so what `multi_head_attention_forward` calls would go unseen; switched on
    again, it would be asked about the same function for ever. So the function's code runs where nothing overrides it.
    """
    if not isinstance(function, types.FunctionType) or "." in function.__qualname__:
        return None  # a Tensor's methods call the methods of its base class, which are dispatched as themselves
    checks = _OVERRIDE_CHECKS & function.__globals__.keys() & set(function.__code__.co_names)
    if not checks:
        return None
    scope = {**function.__globals__, **dict.fromkeys(checks, _not_overridden)}
    body = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _not_overridden(*_: Any) -> bool:
    return False
