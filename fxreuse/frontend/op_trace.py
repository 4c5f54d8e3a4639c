"""What a model's forward calls, in order and with data flow: the basis for telling training from evaluation.

`record` runs a model and gives a `Trace`: every call of a torch function that makes or changes tensors, the module
call it happened in, and where its operands came from. Random numbers are replaced by one given number, so that a
branch taken at random can be steered; numbers that they are compared with are kept. Dropouts are recorded, not applied.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from .mode_modules import ATTENTION

#: Functional dropouts, with what their ``training`` is by default.
DROPOUT = {
    **dict.fromkeys(("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"), True),
    **dict.fromkeys(("alpha_dropout", "feature_alpha_dropout"), False),
}

#: Where a tensor came from: output number ``[1]`` of event ``[0]``, or something that the trace did not make.
Source = tuple[int, int] | str

#: The arguments of dropouts and fused attentions that turn dropout off, with their places.
_OFF: dict[str, dict[str, tuple[int, Any]]] = {
    "scaled_dot_product_attention": {"dropout_p": (4, 0.0)},
    "multi_head_attention_forward": {"dropout_p": (10, 0.0), "training": (13, False)},
    **{name: {"training": (2, False)} for name in DROPOUT},
}

_COMPARISONS = {"lt", "le", "gt", "ge", "__lt__", "__le__", "__gt__", "__ge__", "less", "greater"}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
_GRADIENT_FLAGS = {"requires_grad", "requires_grad_", "retain_grad", "grad", "_backward_hooks"}


@dataclasses.dataclass(frozen=True)
class Event:
    """One call of a torch function.

    ``path`` is the innermost module call, ``a.b@1`` for the second call of ``a.b``; ``order`` the number among the
    attentions, or among the functional dropouts, of that call (-1 for others). ``probability`` is what an attention or
    a dropout applies in the mode of the run; it is no part of ``scalars``. ``random`` marks a replaced random number.
    """

    path: str
    name: str
    scalars: tuple[str, ...]
    sources: tuple[Source, ...]
    order: int = -1
    probability: float = 0.0
    random: bool = False


@dataclasses.dataclass
class Call:
    """One call of a module: its events are ``start`` to ``stop``."""

    path: str
    start: int
    sources: tuple[Source, ...]
    stop: int = -1
    results: tuple[Source, ...] = ()


@dataclasses.dataclass
class Trace:
    """What `record` saw. ``thresholds`` are the numbers that a replaced random number was compared with."""

    events: list[Event] = dataclasses.field(default_factory=list)
    calls: dict[str, Call] = dataclasses.field(default_factory=dict)
    results: tuple[Any, ...] = ()
    drew: bool = False
    thresholds: list[float] = dataclasses.field(default_factory=list)


def record(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], draw: float) -> Trace:
    """Run a model and record what it calls.

    Arguments:
        model: the model, in the mode to be recorded.
        args: positional arguments.
        kwargs: keyword arguments.
        draw: what `torch.rand`, `random.random` and the like give meanwhile.

    >>> trace = record(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()), (torch.randn(2, 4),), {}, draw=0.5)
    >>> [(event.path, event.name) for event in trace.events]
    [('0', 'linear'), ('1', 'gelu')]
    """
    recorder = _Recorder(model, draw)
    for number, leaf in enumerate(pytree.tree_leaves((args, dict(kwargs)))):
        if isinstance(leaf, torch.Tensor):
            recorder.made[leaf] = f"input {number}"
    with recorder.hooks(model), mock.patch.object(random, "random", recorder.python_draw), recorder:
        result = model(*args, **kwargs)
    trace = recorder.trace
    leaves, spec = pytree.tree_flatten(result)
    trace.results = (str(spec), *(recorder.source(x) if isinstance(x, torch.Tensor) else _text(x) for x in leaves))
    return trace


class _Recorder(TorchFunctionMode):
    def __init__(self, model: torch.nn.Module, draw: float) -> None:
        super().__init__()
        self.trace = Trace()
        self.made: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.draws: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.draw = draw
        self.stack = [Call("", 0, ())]
        self.orders: Counter[tuple[str, str]] = Counter()
        named = itertools.chain(model.named_parameters(), model.named_buffers())
        self.names = {id(tensor): name for name, tensor in named}

    def source(self, tensor: torch.Tensor) -> Source:
        known: Source | None = self.made.get(tensor)
        if known is not None:
            return known
        return self.names.get(id(tensor), f"{tensor.dtype}{list(tensor.shape)}")

    def sources(self, tree: Any) -> tuple[Source, ...]:
        return tuple(self.source(leaf) for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))

    @contextlib.contextmanager
    def hooks(self, model: torch.nn.Module) -> Iterator[None]:
        """Keep the stack of module calls, whose paths are numbered as `torch.export` numbers them."""
        counts: Counter[str] = Counter()

        def enter(path: str) -> Callable[..., None]:
            def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
                name = f"{path}@{counts[path]}" if counts[path] else path
                counts[path] += 1
                call = Call(name, len(self.trace.events), self.sources((args, kwargs)))
                self.trace.calls[name] = call
                self.stack.append(call)

            return hook

        def leave(module: torch.nn.Module, args: Any, result: Any) -> None:
            call = self.stack.pop()
            call.stop = len(self.trace.events)
            call.results = self.sources(result)

        handles = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(path), prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name in _COMPARISONS:
            self._compare(args)
        sources = self.sources((args, kwargs))
        probability = _probability(name, args, kwargs)
        args, kwargs = _without_dropout(name, args, kwargs)
        result = func(*args, **kwargs)
        drawn = _is_draw(name, args, kwargs)
        if drawn:
            result = self._replace(result)
        if name == "item" and args[0] in self.draws:
            return _Draw(result, self.trace.thresholds)
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if name in _GRADIENT_FLAGS or not (made or result is None):
            return result
        order, kind = -1, "attention" if name in ATTENTION else "dropout" if name in DROPOUT else ""
        path = self.stack[-1].path
        if kind:
            order = self.orders[path, kind]
            self.orders[path, kind] += 1
        for number, tensor in enumerate([args[0]] if name == "__setitem__" else made):
            self.made[tensor] = (len(self.trace.events), number)
        self.trace.events.append(
            Event(path, name, _scalars(name, args, kwargs), sources, order, probability, random=drawn)
        )
        return result

    def _replace(self, drawn: torch.Tensor) -> torch.Tensor:
        """The given number in place of a random tensor; one whose value is known also where tensors are fake."""
        self.trace.drew = True
        if drawn.numel() == 1:
            drawn = torch.tensor(self.draw, dtype=drawn.dtype, device=drawn.device).reshape(drawn.shape)
        else:
            drawn.fill_(self.draw)
        self.draws[drawn] = True
        return drawn

    def python_draw(self) -> float:
        """Stands in for `random.random`."""
        self.trace.drew = True
        return _Draw(self.draw, self.trace.thresholds)

    def _compare(self, args: tuple[Any, ...]) -> None:
        """Keep the number that a random tensor is compared with."""
        if len(args) == 2 and isinstance(args[0], torch.Tensor) and args[0] in self.draws and _is_number(args[1]):
            self.trace.thresholds.append(float(args[1]))


class _Draw(float):
    """A random number that remembers what it was compared with."""

    thresholds: list[float]

    def __new__(cls, value: float, thresholds: list[float]) -> _Draw:
        self = super().__new__(cls, value)
        self.thresholds = thresholds
        return self

    def _met(self, other: Any) -> Any:
        if _is_number(other):
            self.thresholds.append(float(other))
        return other

    def __lt__(self, other: Any) -> bool:
        return super().__lt__(self._met(other))

    def __le__(self, other: Any) -> bool:
        return super().__le__(self._met(other))

    def __gt__(self, other: Any) -> bool:
        return super().__gt__(self._met(other))

    def __ge__(self, other: Any) -> bool:
        return super().__ge__(self._met(other))


def _name(func: Callable[..., Any]) -> str:
    """A function's name; of an attribute of tensors, the attribute's."""
    name = getattr(func, "__name__", type(func).__name__)
    if name in ("__get__", "__set__"):
        name = func.__self__.__name__  # type: ignore[attr-defined]
    return name.partition(".")[0]


def _is_draw(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return name in ("rand", "rand_like") or (name == "uniform_" and len(args) == 1 and not kwargs)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _probability(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The probability that a dropout or a fused attention applies."""
    if name in DROPOUT:
        given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
        active = given.get("training", given.get("train", DROPOUT[name]))
        return float(given.get("p", 0.5)) if active else 0.0
    if name not in _OFF:
        return 0.0
    given = dict(kwargs)
    given.update({key: args[place] for key, (place, _) in _OFF[name].items() if len(args) > place})
    return float(given.get("dropout_p", 0.0)) if given.get("training", True) else 0.0


def _without_dropout(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with dropout turned off, so that values, and branches on them, are the same in both modes."""
    for key, (place, off) in _OFF.get(name, {}).items():
        if len(args) > place:
            args = (*args[:place], off, *args[place + 1 :])
        else:
            kwargs = {**kwargs, "train" if "train" in kwargs else key: off}
    return args, kwargs


def _scalars(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """The arguments that are no tensors, as text."""
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if not isinstance(leaf, torch.Tensor)]
    if name in _RECURRENT:  # their mode matters only to their dropout, whose probability comes just before it
        leaves = [b if not (type(a) is float and a == 0.0) else None for a, b in itertools.pairwise((None, *leaves))]
    return (*kwargs, *(_text(leaf) for leaf in leaves))


def _text(value: Any) -> str:
    plain = (bool, int, float, str, complex, slice, torch.dtype, torch.device, torch.layout, torch.memory_format)
    return repr(value) if value is None or value is ... or isinstance(value, plain) else type(value).__name__
