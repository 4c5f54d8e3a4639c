"""Whether a rewritten model computes what it should, compiles as one graph, and is faster: measured, not promised."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..frontend.capture import caches_off
from ..frontend.infer import describe_forward, signature_of
from ..frontend.inputs import Inputs, check_model, normalise
from ..record import Record
from ..reports.breakdown import measure_breakdown
from .checks import Compiled, Pair, check_compiled, check_outputs, check_speed, compile_both, copies, mapped
from .verification import Verification

__all__ = ["Verification", "verify"]

_MOST_GRAPHS = 64


def verify(
    original: torch.nn.Module,
    rewritten: torch.nn.Module,
    example_inputs: Any = None,
    *,
    device: torch.device | str | None = None,
    compile: bool | str = True,
    latency: bool = True,
    tolerance: float | None = None,
    seconds: float = 3.0,
    breakdown: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Check a rewritten model against the original, and measure both.

    Copies of both are compared in float64, on the example inputs and on other batch sizes: the rewritten model against
    the original run eagerly with the maps shared as the record says. Then the rewritten model is compiled as one graph
    and compared with itself, and both models are timed in interleaved rounds, eager and compiled. The models given,
    their modes, gradients and the state of random numbers are left as they are.

    Args:
        original: the model as it was.
        rewritten: what `fxreuse.apply` made of it, called in the same way. Without a record it is compared with the
            original itself.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; inferred where left out.
        device: where to check and measure; the device of the original where left out.
        compile: whether to check `torch.compile`; or the name of a backend in place of inductor.
        latency: whether to measure latency and peak memory.
        tolerance: the largest error in float64, relative to the largest magnitude of a tensor. Where left out it is
            1e-10, or 2e-2 where the plan stores maps in a type of its own (``dtype=``).
        seconds: roughly how long to time.
        breakdown: whether to measure the time of every part, too: attention, reused attention, feed-forward,
            convolution and the rest.
        progress: called with a line of text as each step begins.

    Returns:
        The findings; ``passed`` says whether the function is right, ``print`` gives a table.

    Raises:
        UnsupportedError: the models cannot be copied, or the original does not have the sites that the record names.
        InputError: the example inputs do not fit.

    >>> import copy
    >>> model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> verify(model, copy.deepcopy(model), torch.randn(2, 5, 8), compile=False, latency=False).passed
    True
    """
    say = progress or _silent
    check_model(original, "original")
    check_model(rewritten, "rewritten")
    if tolerance is not None and not isinstance(tolerance, (int, float)):
        raise InputError(f"tolerance: expected a number, found {tolerance!r}")
    inputs = normalise(original, example_inputs)
    where = _device(original, inputs) if device is None else _usable(device)
    record = getattr(rewritten, "record", None)
    record = record if isinstance(record, Record) else None
    backend = "inductor" if compile is True else compile
    with _random_state_kept(where), torch.no_grad(), _many_graphs(bool(backend)), contextlib.ExitStack() as stack:
        say("copying both models")
        before, after = (model.to(where).eval() for model in copies(original, rewritten))
        stack.enter_context(caches_off(before))
        stack.enter_context(caches_off(after))
        pair = Pair(before, after, mapped(inputs, lambda tensor: tensor.to(where)))
        _check_runs(pair)
        say("comparing outputs in float64 and float32")
        outputs, shapes = check_outputs(pair, record, tolerance)
        works = outputs.tensors > 0
        compiled = speed = parts = None
        functions: dict[str, Compiled] = {}
        if backend and works:
            say("compiling both models")
            functions, counting, fault = compile_both(pair, backend)
        if latency and works:
            say("timing both models")
            speed = check_speed(pair, record, functions, shapes, seconds)
        if breakdown and works:
            say("timing the parts of both models")
            parts = measure_breakdown(before, after, inputs, pair.call)
        if backend and works:
            say("changing the batch size of the compiled model")
            compiled = check_compiled(pair, functions, counting, fault, outputs.batch_sizes)
    return Verification(
        model=type(original).__name__,
        plan=record.plan if record else "",
        device=str(where),
        dtype=str(pair.dtype).removeprefix("torch."),
        parameters={"original": _parameters(original), "rewritten": _parameters(rewritten)},
        outputs=outputs,
        compiled=compiled,
        speed=speed,
        breakdown=parts,
    )


def _silent(_: str) -> None:
    """Say nothing."""


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _device(model: torch.nn.Module, inputs: Inputs) -> torch.device:
    """The device of the model, or of its inputs where it has no tensors."""
    tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves(tuple(inputs))]
    return next((tensor.device for tensor in tensors if isinstance(tensor, torch.Tensor)), torch.device("cpu"))


def _usable(device: torch.device | str) -> torch.device:
    """A device that tensors can be on here.

    Raises:
        InputError: there is none of that name.
    """
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"device {str(device)!r} cannot be used here: {reason}; leave it out to use the model's"
        ) from error
    return where


def _check_runs(pair: Pair) -> None:
    """Raise where the original fails on the example inputs: there is nothing to compare with then."""
    try:
        pair.call(pair.original)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise InputError(
            f"{type(pair.original).__name__} itself fails on these example_inputs: {type(error).__name__}: "
            f"{lines[0].rstrip('.')}. Pass inputs that it accepts; {describe_forward(signature_of(pair.original))}."
        ) from error


def _many_graphs(compiling: bool) -> contextlib.AbstractContextManager[None]:
    """Let a model be compiled again as often as the batch sizes ask for, so that it can be counted."""
    return torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS) if compiling else contextlib.nullcontext()


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    devices: list[int] = []
    if device.type == "cuda":
        devices = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices=devices):
        yield
