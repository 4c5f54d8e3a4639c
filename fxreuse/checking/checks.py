"""The checks that `fxreuse.verify` is made of: outputs, compilation, speed. Each works on copies of the models."""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from ..errors import FxReuseError, UnsupportedError
from ..frontend.inputs import Inputs
from ..frontend.interception import SiteKey
from ..record import Record
from .measure import Timing, interleaved, peak_memory
from .numerics import Difference, KeepFloat64, difference
from .reference import MapSharing, site_key
from .verification import CompileCheck, OutputCheck, SpeedCheck, speedups
from .weight_reference import has_weights_for, put_weights

EXACT = 1e-10
STORED_MAP = 2e-2
# A comparison that takes longer than this many seconds is made at fewer batch sizes.
_SLOW = 3.0
_CHANGE_THE_FUNCTION = frozenset({"fiak"})
_SHARE_WEIGHTS = frozenset({"share", "residual"})

Compiled = Callable[..., Any]
Shapes = Mapping[SiteKey, tuple[int, ...]]


class Pair(NamedTuple):
    """Copies of both models, in evaluation mode, and the arguments of a call."""

    original: torch.nn.Module
    rewritten: torch.nn.Module
    inputs: Inputs

    @property
    def dtype(self) -> torch.dtype:
        """The type of the original's parameters, or the default where it has none that are floating point."""
        dtypes = [parameter.dtype for parameter in self.original.parameters() if parameter.is_floating_point()]
        return dtypes[0] if dtypes else torch.get_default_dtype()

    def call(self, model: Callable[..., Any]) -> Any:
        """What a model gives for the inputs."""
        return model(*self.inputs.args, **self.inputs.kwargs)

    def cast(self, dtype: torch.dtype) -> Pair:
        """Another pair of copies whose floating-point tensors, the inputs' as well, are float64 or float32."""
        change = torch.nn.Module.double if dtype == torch.float64 else torch.nn.Module.float
        original, rewritten = (change(model) for model in copies(self.original, self.rewritten))
        inputs = mapped(self.inputs, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
        return Pair(original, rewritten, inputs)

    def batch_size(self) -> int | None:
        """The first dimension of the first tensor among the inputs."""
        leaves = pytree.tree_leaves(tuple(self.inputs))
        return next((leaf.size(0) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim), None)

    def with_batch(self, size: int | None) -> Pair:
        """The same models with more or fewer rows in every input that has as many as the batch; rows are repeated."""
        batch = self.batch_size()

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            if batch is None or size is None or size == batch or not tensor.ndim or tensor.size(0) != batch:
                return tensor
            return tensor[torch.arange(size, device=tensor.device) % batch]

        return self._replace(inputs=mapped(self.inputs, rows))


def copies(*models: torch.nn.Module) -> Sequence[torch.nn.Module]:
    """Deep copies; tensors that the models share among them are shared among the copies."""
    try:
        return copy.deepcopy(models)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(
            f"verification works on copies, and {' or '.join(type(model).__name__ for model in models)} cannot be "
            f"copied: {_line(error)}; give the module a __deepcopy__, or remove what it caches from an earlier call"
        ) from error


def mapped(inputs: Inputs, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    """The arguments of a call with every tensor changed."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, change, tuple(inputs))
    return Inputs(args, kwargs)


def check_outputs(pair: Pair, record: Record | None, tolerance: float | None) -> tuple[OutputCheck, Shapes]:
    """Compare outputs with the eager reference in float64 and in float32. Returns the shapes of leaders' maps, too.

    At another batch size than the example's the rewritten model may refuse, in an error of this package, but not fail.
    """
    followers = _followers(record)
    plan = record.plan if record else ""
    known = record is None or has_weights_for(pair.original, record)
    unknown = _CHANGE_THE_FUNCTION if known else _CHANGE_THE_FUNCTION | _SHARE_WEIGHTS
    changing = sorted(unknown & {part.split()[0] for part in plan.split("|") if part.strip()})
    if tolerance is None:
        tolerance = STORED_MAP if re.search(r"\bdtype=", plan) else EXACT
    wide, batch = _meant(pair.cast(torch.float64), record), pair.batch_size()
    begun = time.perf_counter()
    total, shapes = _compare(wide, followers)
    took = time.perf_counter() - begun
    tensors = total.compared
    sizes = [batch] if batch is not None and tensors else []
    notes = (
        [f"by design, {' and '.join(changing)} makes another function: errors are for information"] if changing else []
    )
    for size in _nearby(batch, few=took > _SLOW) if tensors else ():
        try:
            found, _ = _compare(wide.with_batch(size), followers, example=False)
        except _RefusedError as refused:
            notes.append(f"batch size {size} was not compared: {refused}")
            continue
        total = total.merged(found)
        sizes.append(size)
    single, _ = _compare(_meant(pair.cast(torch.float32), record), followers) if tensors else (total, shapes)
    count = f"{len(followers)} follower{'' if len(followers) == 1 else 's'}"
    against = f"eager sharing, {count}" if followers else "the original"
    if record is not None and record.matrices and known:
        against += ", its weights shared" if followers else " with shared weights"
    check = OutputCheck(
        against=against,
        error_float64=total.error,
        error_float32=single.error,
        tolerance=tolerance,
        worst=total.where,
        tensors=tensors,
        batch_sizes=tuple(sizes),
        required=not changing,
        faults=total.faults,
        notes=tuple(notes),
    )
    return check, shapes


def _meant(pair: Pair, record: Record | None) -> Pair:
    """The pair with an original whose weights are those that the rewritten model works with."""
    if record is not None and record.matrices and has_weights_for(pair.original, record):
        put_weights(pair.original, pair.rewritten, record)
    return pair


class _RefusedError(Exception):
    """A model does not take an input that was made up for it."""


def _compare(pair: Pair, followers: Mapping[SiteKey, SiteKey], example: bool = True) -> tuple[Difference, Shapes]:
    """The difference of the rewritten model from the reference, on one input; a failure is a fault of its own."""
    with KeepFloat64():
        try:
            with MapSharing(pair.original, followers) as sharing:
                expected = pair.call(pair.original)
        except Exception as error:
            if example:
                raise
            raise _RefusedError(f"the original refuses it ({_line(error)})") from error
        try:
            found = pair.call(pair.rewritten)
        except Exception as error:
            if isinstance(error, FxReuseError) and not example:
                raise _RefusedError(f"the rewritten model refuses it ({_line(error)})") from error
            fault = f"at batch size {pair.batch_size()} the rewritten model fails: {_line(error)}"
            return Difference(math.inf, "", 0, (fault,)), sharing.shapes
    return difference(expected, found), sharing.shapes


class Counting:
    """A backend of `torch.compile` that counts the graphs it is given."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.graphs = 0
        self._compile = torch._dynamo.lookup_backend(name)

    def __call__(self, module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        """Compile one graph."""
        self.graphs += 1
        return self._compile(module, inputs)


def compile_both(pair: Pair, backend: str) -> tuple[dict[str, Compiled], Counting, str]:
    """Compile and call both models: those that work, the rewritten one's backend, and what is wrong with the latter."""
    counting = Counting(backend)
    candidates = {
        "original": torch.compile(pair.original, backend=backend),
        "rewritten": torch.compile(pair.rewritten, backend=counting, fullgraph=True),
    }
    works, faults = {}, {}
    for name, function in candidates.items():
        try:
            pair.call(function)
            works[name] = function
        except Exception as error:
            faults[name] = f"torch.compile(fullgraph=True) of the rewritten model fails: {_line(error)}"
    return works, counting, faults.get("rewritten", "")


def check_compiled(
    pair: Pair, functions: Mapping[str, Compiled], counting: Counting, fault: str, batch_sizes: Sequence[int]
) -> CompileCheck:
    """Compare the compiled rewritten model with itself, eager, at every batch size, and count what is compiled."""
    notes = () if "original" in functions else ("torch.compile fails on the original",)
    faults = [fault] if fault else []
    total = Difference(0.0, "", 0)
    sizes = [
        size for size in batch_sizes if size > 1 or size == pair.batch_size()
    ]  # a size of 1 is always its own graph
    for size in sizes if not fault else ():
        this = pair.with_batch(size)
        try:
            total = total.merged(difference(this.call(this.rewritten), this.call(functions["rewritten"])))
        except Exception as error:
            faults.append(f"compiled, the rewritten model fails at batch size {size}: {_line(error)}")
    return CompileCheck(
        backend=counting.name,
        error=total.error if total.compared else math.inf,
        tolerance=math.sqrt(torch.finfo(pair.dtype).eps),
        graphs=counting.graphs,
        batch_sizes=tuple(sizes),
        faults=(*faults, *total.faults),
        notes=notes,
    )


def check_speed(
    pair: Pair, record: Record | None, functions: Mapping[str, Compiled], shapes: Shapes, seconds: float
) -> SpeedCheck:
    """Time both models, eager and compiled, in interleaved rounds; measure peak memory; explain what is no faster."""
    models = {"original": pair.original, "rewritten": pair.rewritten}
    calls: dict[str, Callable[[], object]] = {f"{name} eager": _calling(pair, run) for name, run in models.items()}
    if models.keys() == functions.keys():
        calls.update({f"{name} compiled": _calling(pair, run) for name, run in functions.items()})
    latency = interleaved(calls, seconds=seconds)
    device = next((p.device for p in pair.original.parameters()), torch.device("cpu"))
    peaks: dict[str, int] = {}
    notes: tuple[str, ...] = ()
    if device.type in ("cpu", "cuda"):
        peaks = {name: peak_memory(calls[name], device) for name in ("original eager", "rewritten eager")}
    else:
        notes = (f"peak memory is not measured on {device.type}",)
    return SpeedCheck(latency, peaks, _no_faster(pair, record, shapes, latency), notes)


def _no_faster(pair: Pair, record: Record | None, shapes: Shapes, latency: Mapping[str, Timing]) -> tuple[str, ...]:
    slow = {way: ratio for way, ratio in speedups(latency).items() if ratio.low <= 1}
    because = "; ".join(_causes(pair, record, shapes)) if slow else ""
    return tuple(f"no faster here, {way} ({ratio.median:.2f}×), because {because}" for way, ratio in slow.items())


def _causes(pair: Pair, record: Record | None, shapes: Shapes) -> list[str]:
    """What is true of the rewrite and limits what it can save at these sizes."""
    if record is None:
        return ["the model carries no record of a rewrite"]
    followers = [decision for decision in record.decisions if decision.action == "follow"]
    causes = []
    if not followers:
        causes.append("no attention follows another, so every map is computed as before")
    stored = sum(decision.lowering == "materialize" for decision in followers)
    again = sum(decision.lowering == "recompute" for decision in followers)
    if stored and shapes:
        shape = max(shapes.values(), key=math.prod)
        size = math.prod(shape) * pair.dtype.itemsize / 2**20
        sizes = "×".join(map(str, shape))
        causes.append(f"{stored} of {len(followers)} followers read a stored map of up to {sizes} ({size:.2f} MiB)")
    if again:
        causes.append(f"{again} of {len(followers)} followers compute scores again, and save projections only")
    count = sum(parameter.numel() for parameter in pair.original.parameters())
    if record.removed and count:
        causes.append(f"what was removed is {record.parameters_removed / count:.1%} of the parameters")
    if record.added:
        causes.append(f"{record.parameters_added:,} parameters were added")
    return causes


def _followers(record: Record | None) -> dict[SiteKey, SiteKey]:
    decisions = record.decisions if record else ()
    return {site_key(d.site): site_key(d.leader) for d in decisions if d.action == "follow" and d.leader}


def _nearby(batch: int | None, few: bool) -> list[int]:
    """Other batch sizes to try: one less, one more, and twice as many and one; of a slow model only one more."""
    if batch is None:
        return []
    sizes = (batch + 1,) if few else (batch - 1, batch + 1, 2 * batch + 1)
    return sorted({size for size in sizes if size > 0})


def _calling(pair: Pair, model: Compiled) -> Callable[[], object]:
    return lambda: pair.call(model)


def _line(error: BaseException) -> str:
    """An error in one line."""
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
