"""How long a program takes on a device, kernel by kernel.

On a CPU a kernel takes the time of its arithmetic with everything in the caches of its cores, and what it waits for
bytes that are not there, and longer for those that are in no cache; then what a call costs, and the page faults of
large new blocks. On an accelerator these go on side by side, and the longest counts. Which bytes are in which cache is
followed through the whole run (`residency`).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import sympy
import torch
from tabulate import tabulate

from ..errors import InputError
from .device import Device
from .fusion import fuse
from .kernels import Kernel, kernels_of
from .operations import Operation
from .residency import Caches, Residency, Traffic
from .summary import Summary

# Bytes of a line of cache.
_LINE = 64
# What the bytes of a family of products are moved for, one of `device.USES`.
_USES = {
    "linear": "linear", "convolution": "linear", "depthwise": "linear", "batched": "batched", "attention": "batched",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The predicted time of one forward pass, and of which operations it is made.

    ``operations`` has the seconds of every operation in the order of execution; `by_kind` and `by_module` add them up.
    Printing it gives a table.
    """

    device: str
    compiled: bool
    sizes: Mapping[str, int]
    operations: tuple[tuple[Operation, float], ...]

    @property
    def seconds(self) -> float:
        """The whole time."""
        return sum(seconds for _, seconds in self.operations)

    @property
    def by_kind(self) -> dict[str, float]:
        """Seconds per kind of operation, the longest first."""
        return self._by(lambda operation: operation.kind)

    @property
    def by_module(self) -> dict[str, float]:
        """Seconds per innermost module call, in the order of execution."""
        return self._by(lambda operation: operation.module, ordered=False)

    def by(self, part: Callable[[Operation], str]) -> dict[str, float]:
        """Seconds per part, the longest first, where ``part`` names the one that an operation belongs to."""
        return self._by(part)

    def _by(self, part: Callable[[Operation], str], ordered: bool = True) -> dict[str, float]:
        found: defaultdict[str, float] = defaultdict(float)
        for operation, seconds in self.operations:
            found[part(operation)] += seconds
        return dict(sorted(found.items(), key=lambda entry: -entry[1])) if ordered else dict(found)

    def __str__(self) -> str:
        total = self.seconds
        mode = "compiled" if self.compiled else "eager"
        sizes = ", ".join(f"{name} = {size}" for name, size in self.sizes.items())
        rows = [
            [kind, f"{1e3 * seconds:.3g}", f"{seconds / total:.0%}"]
            for kind, seconds in self.by_kind.items()
            if seconds
        ]
        table = tabulate(rows, ["kind", "ms", "share"], disable_numparse=True, colalign=("left", "right", "right"))
        return f"{1e3 * total:.3g} ms predicted on {self.device}, {mode}, {sizes}\n\n{table}"


def predict_latency(
    summary: Summary,
    device: Device | torch.device | str = "cpu",
    sizes: Mapping[str, int] | None = None,
    *,
    compiled: bool = False,
) -> Prediction:
    """Predict how long one forward pass of a program takes in inference.

    Arguments:
        summary: of the program, see `summarise`.
        device: a `Device`, the name of a preset, or ``"cpu"`` for this machine, which is measured once.
        sizes: such as ``{"B": 1, "T": 512}``; those of the example inputs where left out.
        compiled: as `torch.compile` runs it: elementwise work is merged, and calls cost less.

    Raises:
        InputError: for sizes that are missing, unknown or out of range, a device that is unknown, or a dtype that it
            lacks.

    >>> from fxreuse.cost_model.summary import summarise
    >>> from fxreuse.frontend.load import load_program
    >>> layer = torch.nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    >>> summary = summarise(load_program(layer, torch.ones(2, 8, 64)))
    >>> short, long = (predict_latency(summary, "A100", {"B": 1, "T": length}) for length in (1024, 4096))
    >>> short.seconds < long.seconds
    True
    """
    values = summary.values_of_example() if sizes is None else summary.values(**sizes)
    return predict(summary.operations, values, Device.of(device), compiled=compiled)


def predict(
    operations: Sequence[Operation],
    values: Mapping[sympy.Symbol, int],
    device: Device,
    *,
    compiled: bool = False,
) -> Prediction:
    """Predict how long operations take, one after the other, when they are run again and again.

    Arguments:
        operations: those of a program, in order.
        values: of every symbol in their expressions.
        device: where.
        compiled: as `torch.compile` runs them.

    Raises:
        InputError: for a symbol without a value, or a dtype that the device lacks.
    """
    at = _evaluator(values)
    eager_cpu = device.kind == "cpu" and not compiled
    made = [kernel for operation in operations for kernel in kernels_of(operation, at, eager_cpu)]
    made = fuse(made) if compiled else made
    accesses = [access for operation in operations for access in operation.reads]
    lasting = {access.storage for access in accesses if access.role != "activation"}
    caches = Caches(device.own_cache, device.cache, device.retention)
    residency = Residency(caches, heap=device.fault > 0)
    traffic = residency.run(made, lasting, lambda kernel, moved: kernel_seconds(kernel, moved, device, compiled))
    seconds: defaultdict[int, float] = defaultdict(float)
    for kernel, moved in zip(made, traffic, strict=True):
        seconds[id(kernel.operation)] += kernel_seconds(kernel, moved, device, compiled)
    timed = tuple((operation, seconds[id(operation)]) for operation in operations)
    return Prediction(device.name, compiled, {str(symbol): size for symbol, size in values.items()}, timed)


def kernel_seconds(kernel: Kernel, moved: Traffic, device: Device, compiled: bool = False) -> float:
    """The time of one kernel, with what it moves to and from memory."""
    work = _arithmetic(kernel, device, compiled) + _ragged(kernel, moved, device)
    dispatch = device.dispatch(kernel.dispatch, compiled) if kernel.dispatch else 0.0
    if device.asynchronous:
        touched = sum(size for _, size in (*kernel.reads, *kernel.writes)) if kernel.product is None else 0
        return max(dispatch, work, touched / device.cache_rate, moved.memory / device.memory)
    return dispatch + work + _missed(kernel, moved, device) + moved.faulted * device.fault


def _missed(kernel: Kernel, moved: Traffic, device: Device) -> float:
    """What a kernel waits on a CPU for bytes that are not in the caches of its cores."""
    if kernel.product is not None:
        return device.missed(_USES[kernel.family], moved.outer, moved.memory)
    return device.missed("read", moved.outer, moved.memory - moved.written) + device.missed("write", 0.0, moved.written)


def _arithmetic(kernel: Kernel, device: Device, compiled: bool) -> float:
    seconds = 0.0
    if kernel.product is not None:
        seconds += device.product(kernel.family, *kernel.product, kernel.dtype)
    if kernel.scores:
        seconds += kernel.scores * (device.score + (device.masked_score if kernel.masked else 0.0))
    if kernel.elements:
        alone = device.threads
        if device.grain:
            alone = min(device.threads, -(-kernel.elements // device.grain))
        each = device.element(kernel.family) - (device.element("add") if compiled and kernel.fusible else 0.0)
        seconds += kernel.elements * max(0.0, each) * device.threads / alone
    return seconds


def _ragged(kernel: Kernel, moved: Traffic, device: Device) -> float:
    """What it costs that the rows of a result share lines of cache: nothing where the cores' own caches hold it."""
    if kernel.product is None or kernel.family not in ("linear", "batched"):
        return 0.0
    batch, m, n, _ = kernel.product
    elements, item = batch * m * n, kernel.dtype.itemsize
    if n * item % _LINE == 0:
        return 0.0
    outer, memory = (min(1.0, size / (elements * item)) for size in (moved.outer, moved.memory))
    return elements * (device.ragged * outer + device.ragged_memory * memory)


def _evaluator(values: Mapping[sympy.Symbol, int]) -> Callable[[sympy.Expr], int]:
    """A function that gives the number for a size, each expression worked out once."""
    replaced = {symbol: sympy.Integer(size) for symbol, size in values.items()}
    known: dict[sympy.Expr, int] = {}

    def at(expression: sympy.Expr) -> int:
        found = known.get(expression)
        if found is None:
            number = sympy.sympify(expression).xreplace(replaced)
            if number.free_symbols:
                missing = ", ".join(sorted(map(str, number.free_symbols)))
                raise InputError(
                    f"The size {missing} has no value, but an operation's size {expression} depends on it."
                )
            found = known[expression] = int(number)
        return found

    return at
