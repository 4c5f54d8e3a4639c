"""Modules that behave differently in training and in evaluation, kept whole while a model is captured.

A capture runs in evaluation mode, in which a dropout leaves no trace and a batch normalisation is frozen. While
`marked` is active each such module shows up in the graph as one opaque operator that carries its path, from which the
module itself can be put back. What counts is what a class does, not what it is called: it has no children, its
methods read ``training``, and a call takes one tensor and gives one of the same shape and dtype.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules import batchnorm, dropout, instancenorm
from torch.overrides import TorchFunctionMode

#: Functions that hold an attention map: one call is one softmax of the graph, or one fused attention.
ATTENTION = frozenset({
    "softmax", "_softmax", "softmin", "gumbel_softmax", "scaled_dot_product_attention", "multi_head_attention_forward",
})  # fmt: skip

#: Functions that a rewrite has to see: a module that calls one of them is never made opaque.
VISIBLE = ATTENTION | {
    "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "addmm", "addbmm", "baddbmm", "einsum",
    "tensordot", "linear", "bilinear", "conv1d", "conv2d", "conv3d", "log_softmax",
}  # fmt: skip


@torch.library.custom_op("fxreuse::mode_module", mutates_args=())
def mode_module(x: torch.Tensor, path: str) -> torch.Tensor:
    """Stands in a graph for the call of the module at ``path``; run by itself, it is the identity."""
    return x.clone()


@mode_module.register_fake
def _(x: torch.Tensor, path: str) -> torch.Tensor:
    return torch.empty_like(x)


#: What a marked call is in a graph.
MARKER = torch.ops.fxreuse.mode_module.default


def mode_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules without children whose behaviour depends on train and eval mode, by path (the first, if several).

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.1), torch.nn.BatchNorm1d(4))
    >>> list(mode_modules(model))
    ['1', '2']
    """
    return {
        path: module
        for path, module in model.named_modules()
        if path and not any(True for _ in module.children()) and _depends_on_mode(module)
    }


@contextlib.contextmanager
def marked(
    model: torch.nn.Module, marker: Callable[[torch.Tensor, str], torch.Tensor] = mode_module
) -> Iterator[dict[str, torch.nn.Module]]:
    """While active, a call of one of `mode_modules` gives the operator ``fxreuse::mode_module`` instead of running.

    A module that is called in a way that the operator cannot stand for (several arguments, a result of another shape
    or dtype), or whose code contracts tensors or takes a softmax, runs its own code from then on and leaves the
    dictionary (under strict export, only the graph says so). Everything is put back at the end.

    Arguments:
        model: the model, in evaluation mode.
        marker: another function of the tensor and the path, in place of that operator.

    Yields:
        The marked modules by path.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.1)).eval()
    >>> with marked(model):
    ...     program = torch.export.export(model, (torch.randn(2, 4),))
    >>> [node.args[1] for node in program.graph.nodes if node.target is torch.ops.fxreuse.mode_module.default]
    ['1']
    """
    modules = mode_modules(model)
    originals = [(module, module.__dict__.get("forward")) for module in modules.values()]
    try:
        for path, module in list(modules.items()):
            module.forward = _marked_forward(path, module, modules, marker)
        yield modules
    finally:
        for module, original in originals:
            module.__dict__.pop("forward", None)
            if original is not None:
                module.__dict__["forward"] = original


def _marked_forward(
    path: str,
    module: torch.nn.Module,
    modules: dict[str, torch.nn.Module],
    marker: Callable[[torch.Tensor, str], torch.Tensor],
) -> Callable[..., Any]:
    """The ``forward`` that a marked module has meanwhile."""
    own = module.forward
    known = "forward" not in module.__dict__ and type(module).forward.__module__ in _KNOWN
    suspicious = _seems_to_work(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if path not in modules or len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
            modules.pop(path, None)
            return own(*args, **kwargs)
        (x,) = args
        if known:
            return marker(x, path)
        if torch.compiler.is_dynamo_compiling():
            result, works = own(x), suspicious
        else:
            with _Watch() as watch:
                result = own(x)
            works = watch.worked
        if works or not _alike(x, result):
            modules.pop(path, None)
            return result
        return marker(x, path)

    return forward


class _Watch(TorchFunctionMode):
    """Notices calls of functions that have to stay visible."""

    def __init__(self) -> None:
        super().__init__()
        self.worked = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "").partition(".")[0] in VISIBLE:
            self.worked = True
        return func(*args, **(kwargs or {}))


def _seems_to_work(module: torch.nn.Module) -> bool:
    """What `_Watch` finds out, guessed from the code alone: strict export cannot trace a watch."""
    named = {name for code in _codes_of(type(module)) for name in code.co_names}
    return not named.isdisjoint(VISIBLE) or any(parameter.ndim > 1 for parameter in module.parameters())


def _alike(x: torch.Tensor, result: Any) -> bool:
    return isinstance(result, torch.Tensor) and result.shape == x.shape and result.dtype == x.dtype


#: Where the classes are defined whose calls need no look at what they do.
_KNOWN = frozenset({dropout.__name__, batchnorm.__name__})


def _depends_on_mode(module: torch.nn.Module) -> bool:
    if isinstance(module, (dropout._DropoutNd, batchnorm._BatchNorm)):
        return True
    if isinstance(module, instancenorm._InstanceNorm):
        return module.track_running_stats
    return reads_training(type(module))


def reads_training(kind: type) -> bool:
    """Whether a method of the class names ``training``, its own or one that it inherits, but not `torch.nn.Module`'s.

    >>> reads_training(torch.nn.Dropout), reads_training(torch.nn.Linear)
    (True, False)
    """
    return any("training" in code.co_names for code in _codes_of(kind))


def _codes_of(kind: type) -> Iterator[types.CodeType]:
    """The code of a class, without what it inherits from `torch.nn.Module`.

    Methods, properties, what decorators wrap, and functions inside functions.
    """
    bases = [base for base in kind.__mro__ if base not in (torch.nn.Module, object)]
    pending = [value for base in bases for value in vars(base).values()]
    seen: set[int] = set()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, types.CodeType):
            yield item
            pending += [constant for constant in item.co_consts if isinstance(constant, types.CodeType)]
        elif isinstance(item, types.FunctionType):
            pending += [item.__code__, getattr(item, "__wrapped__", None)]
            pending += [cell.cell_contents for cell in item.__closure__ or () if _is_function(cell)]
        elif isinstance(item, (staticmethod, classmethod)):
            pending.append(item.__func__)
        elif isinstance(item, property):
            pending += [item.fget, item.fset]


def _is_function(cell: types.CellType) -> bool:
    try:
        return isinstance(cell.cell_contents, types.FunctionType)
    except ValueError:  # an empty cell
        return False
