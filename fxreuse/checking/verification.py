"""What a check of a rewritten model found: all numbers, the verdict, and how a person reads it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from ..reports.breakdown import Breakdown
from .measure import Spread, Timing


@dataclasses.dataclass(frozen=True)
class OutputCheck:
    """Outputs of the rewritten model against the eager reference.

    Errors are relative to the largest magnitude of a tensor. ``required`` is False where the plan changes the function
    by design, so that there is no reference to be equal to.
    """

    against: str
    error_float64: float
    error_float32: float
    tolerance: float
    worst: str
    tensors: int
    batch_sizes: tuple[int, ...]
    required: bool = True
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CompileCheck:
    """`torch.compile` of the rewritten model as one graph; ``graphs`` counts what was compiled over the batch sizes."""

    backend: str
    error: float
    tolerance: float
    graphs: int
    batch_sizes: tuple[int, ...]
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def recompiles(self) -> int:
        """How often a new batch size made the compiler run again."""
        return max(0, self.graphs - 1)


@dataclasses.dataclass(frozen=True)
class SpeedCheck:
    """Latencies, measured interleaved, and peak memory; keys are ``"original eager"``, ``"rewritten compiled"`` …."""

    latency: Mapping[str, Timing]
    peak_bytes: Mapping[str, int]
    no_faster: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def speedup(self) -> dict[str, Spread]:
        """How many times faster the rewritten model is, ``"eager"`` and ``"compiled"`` as far as measured."""
        return speedups(self.latency)


def speedups(latency: Mapping[str, Timing]) -> dict[str, Spread]:
    """The speed-up of the rewritten model in every way that both models were timed in."""
    ways = [name.removeprefix("original ") for name in latency if name.startswith("original ")]
    return {
        way: latency[f"rewritten {way}"].speedup_over(latency[f"original {way}"])
        for way in ways
        if f"rewritten {way}" in latency
    }


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `fxreuse.verify` found. Printing it gives a table.

    ``predicted`` is for whoever knows a prediction: `dataclasses.replace` it with ratios, original over rewritten, by
    the name of a row (``"latency, eager"``, ``"parameters"``, or a row of its own such as ``"MACs"``); they are shown
    next to what was measured.

    >>> outputs = OutputCheck("the original", 1e-15, 1e-7, 1e-10, "logits", 1, (2, 3))
    >>> found = Verification("Net", "2x2", "cpu", "float32", {"original": 12, "rewritten": 8}, outputs)
    >>> found.passed, found.reasons
    (True, ())
    >>> print(found)
    PASSED  Net, plan 2x2, cpu, float32
    <BLANKLINE>
    check                                found    allowed    verdict
    -----------------------------------  -------  ---------  ---------
    outputs in float64 vs. the original  1.0e-15  1.0e-10    ok
    outputs in float32 vs. the original  1.0e-07
    <BLANKLINE>
    measured      original    rewritten  ratio
    ----------  ----------  -----------  -------
    parameters          12            8  1.50×
    <BLANKLINE>
    outputs compared: 1 tensor, batch sizes 2, 3
    """

    model: str
    plan: str
    device: str
    dtype: str
    parameters: Mapping[str, int]
    outputs: OutputCheck
    compiled: CompileCheck | None = None
    speed: SpeedCheck | None = None
    predicted: Mapping[str, float] = dataclasses.field(default_factory=dict)
    breakdown: Breakdown | None = None

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it did not pass, one sentence each; empty where it did."""
        outputs, compiled = self.outputs, self.compiled
        reasons = list(outputs.faults)
        if outputs.required and not reasons and not outputs.error_float64 <= outputs.tolerance:
            reasons.append(
                f"outputs in float64 differ from {outputs.against} by {outputs.error_float64:.1e} in "
                f"{outputs.worst or 'the output'}, allowed {outputs.tolerance:.1e}"
            )
        if compiled is not None:
            reasons += compiled.faults
            if not compiled.faults and not compiled.error <= compiled.tolerance:
                reasons.append(
                    f"compiled outputs differ from eager ones by {compiled.error:.1e}, allowed {compiled.tolerance:.1e}"
                )
        return tuple(reasons)

    @property
    def passed(self) -> bool:
        """Whether the rewritten model computes what it should, eager and compiled. Speed is no part of it."""
        return not self.reasons

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out and why, and where it is no faster and why."""
        parts = [part for part in (self.outputs, self.compiled, self.speed) if part is not None]
        faster = self.speed.no_faster if self.speed else ()
        return (*(note for part in parts for note in part.notes), *faster)

    def to_json(self, indent: int | None = 2) -> str:
        """Everything that was found, as JSON; a number that is not finite becomes its name."""
        found = dataclasses.asdict(self)
        found.update(passed=self.passed, reasons=self.reasons, notes=self.notes)
        if self.compiled is not None:
            found["compiled"]["recompiles"] = self.compiled.recompiles
        if self.speed is not None:
            found["speed"]["speedup"] = {way: dataclasses.asdict(s) for way, s in self.speed.speedup.items()}
        return json.dumps(_finite(found), indent=indent, ensure_ascii=False)

    def __str__(self) -> str:
        verdict = "PASSED" if self.passed else "FAILED"
        plan = f"plan {self.plan}" if self.plan else "no plan"
        sizes = ", ".join(map(str, self.outputs.batch_sizes)) or "none"
        tensors = f"{self.outputs.tensors} tensor{'' if self.outputs.tensors == 1 else 's'}"
        checks = tabulate(self._checks(), ["check", "found", "allowed", "verdict"], disable_numparse=True)
        measures = tabulate(
            self._measures(),
            ["measured", "original", "rewritten", "ratio", *(["predicted"] if self.predicted else [])],
            disable_numparse=True,
            colalign=("left", "right", "right"),
        )
        lines = [f"{verdict}  {self.model}, {plan}, {self.device}, {self.dtype}"]
        lines += [f"  because: {reason}" for reason in self.reasons]
        parts = ["", breakdown_table(self.breakdown)] if self.breakdown is not None else []
        lines += ["", checks, "", measures, *parts, "", f"outputs compared: {tensors}, batch sizes {sizes}"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _checks(self) -> list[list[str]]:
        outputs, compiled = self.outputs, self.compiled
        wanted = [f"{outputs.tolerance:.1e}", _verdict(outputs.error_float64 <= outputs.tolerance)]
        rows = [
            [f"outputs in float64 vs. {outputs.against}", f"{outputs.error_float64:.1e}"]
            + (wanted if outputs.required else ["by design", ""]),
            [f"outputs in float32 vs. {outputs.against}", f"{outputs.error_float32:.1e}", "", ""],
        ]
        if compiled is not None:
            sizes = ", ".join(map(str, compiled.batch_sizes)) or "none"
            fine = not compiled.faults and compiled.error <= compiled.tolerance
            error = f"{compiled.error:.1e}"
            rows.append(
                [f"compiled ({compiled.backend}) vs. eager", error, f"{compiled.tolerance:.1e}", _verdict(fine)]
            )
            rows.append([f"recompiles over batch sizes {sizes}", str(compiled.recompiles), "", ""])
        return rows

    def _measures(self) -> list[list[str]]:
        before, after = self.parameters["original"], self.parameters["rewritten"]
        rows = {"parameters": [f"{before:,}", f"{after:,}", _ratio(before, after)]}
        if self.speed is not None:
            rows.update(_speed_rows(self.speed))
        for name in self.predicted:
            rows.setdefault(name, ["", "", ""])
        texts = {name: f"{ratio:.2f}×" for name, ratio in self.predicted.items()}
        return [[name, *row, *([texts.get(name, "")] if texts else [])] for name, row in rows.items()]


def _speed_rows(speed: SpeedCheck) -> dict[str, list[str]]:
    rows = {}
    for way, spread in speed.speedup.items():
        before, after = (str(speed.latency[f"{model} {way}"]) for model in ("original", "rewritten"))
        rows[f"latency, {way}"] = [before, after, f"{spread.median:.2f}× ({spread.low:.2f} to {spread.high:.2f})"]
    if speed.peak_bytes:
        peaks = [speed.peak_bytes[f"{model} eager"] for model in ("original", "rewritten")]
        rows["peak memory, eager"] = [*(f"{peak / 2**20:.2f} MiB" for peak in peaks), _ratio(*peaks)]
    return rows


def breakdown_table(found: Breakdown) -> str:
    """The time of every part, and its share of the whole.

    >>> one = Breakdown({"attention": 0.003, "rest": 0.001}, {"reused attention": 0.001, "rest": 0.001})
    >>> print(breakdown_table(one))
    part                original         rewritten
    ----------------  ----------  ---  -----------  ---
    attention            3.00 ms  75%
    reused attention                       1.00 ms  50%
    rest                 1.00 ms  25%      1.00 ms  50%
    """
    wholes = [sum(found.original.values()), sum(found.rewritten.values())]
    rows = []
    for part in found.parts:
        row = [part]
        for times, whole in zip((found.original, found.rewritten), wholes, strict=True):
            seconds = times.get(part, 0.0)
            row += [f"{1e3 * seconds:.2f} ms", f"{seconds / whole:.0%}"] if seconds else ["", ""]
        rows.append(row)
    return tabulate(
        rows,
        ["part", "original", "", "rewritten", ""],
        disable_numparse=True,
        colalign=("left", "right", "right", "right", "right"),
    )


def _verdict(fine: bool) -> str:
    return "ok" if fine else "FAILED"


def _ratio(before: float, after: float) -> str:
    return f"{before / after:.2f}×" if after else ""


def _finite(value: Any) -> Any:
    """The same data with every number that JSON cannot write as text."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
