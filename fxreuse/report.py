"""`fxreuse.report`: what a plan saves, counted before anything is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from .apply import rewrite
from .cost_model.device import Device
from .cost_model.execution import without_single_values
from .cost_model.parts import Parts
from .cost_model.summary import Summary, summarise
from .emission.rewritten import Rewritten
from .errors import InputError
from .finding.find import find
from .frontend.inputs import Inputs, bind
from .frontend.inputs import normalise as normalise_inputs
from .frontend.lengths import bound_lengths
from .frontend.load import load_program
from .frontend.target import captured_inputs
from .passes.meant_for import meant_for
from .plans.plan import Plan
from .plans.plan_fiak import Fiak
from .program import Program
from .prune import prune
from .reports.cost_report import CostReport

#: The lengths that a report shows where none are asked for, as far as the model takes them.
LENGTHS = (128, 256, 512, 1024, 2048)

Sizes = Mapping[str, int | Sequence[int]]


def report(
    model: torch.nn.Module | ExportedProgram,
    plan: str | Plan | None = None,
    example_inputs: Any = None,
    *,
    device: Device | torch.device | str | None = None,
    sizes: Sizes | None = None,
    target: str | None = None,
) -> CostReport:
    """What a model costs, and what a plan saves, from the captured graph: nothing is trained, run or measured.

    Arguments:
        model: any Transformer, also one on the meta device, whose weights take no memory.
        plan: such as ``"4x4"``, see `Plan`; without one the report is of the model alone.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; inferred where left
            out.
        device: what latency is predicted for, and what lowerings that the plan leaves open are chosen for: ``"cpu"``
            measures this machine once, ``"A100"`` and the like are known (see `cost_model.Device`). Where left out, a
            GPU that the model is on, or else a CPU: this one, if it was measured, and otherwise a typical one.
        sizes: the sizes that the report shows, by name: ``{"B": 1, "T": (128, 512)}``; one of them may have several
            values. Where left out, ``B`` is the example's batch (1 where there is no example) and ``T`` runs over
            `LENGTHS`; other lengths are as ``T``.
        target: the path of a submodule: only it is captured and counted.

    Returns:
        A report: ``.before`` and ``.after`` have expressions in the sizes, and numbers at any; ``print`` gives tables.

    Raises:
        PlanError, CaptureError, UnsupportedError: as `fxreuse.apply`.
        InputError: for a size that the model does not have or take, a device that is not known, or one that lacks the
            model's dtype.

    >>> import torch, fxreuse
    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    >>> found = fxreuse.report(model, "2x2 lowering=materialize", torch.randn(1, 5, 16))
    >>> print(found.before.macs)
    128*B*T**2 + 8192*B*T
    >>> print(found.after.macs)
    96*B*T**2 + 7168*B*T
    >>> found.after.at(B=8, T=512).macs
    230686720
    """
    where = _device(model, device)
    parsed = None if plan is None else Plan.of(plan)
    if target is not None:
        model, example_inputs = captured_inputs(model, target, example_inputs)
    given, example_inputs = example_inputs, _beside(model, example_inputs)
    program = load_program(model, example_inputs)
    sites = find(program)
    if parsed is not None:
        program, sites = bound_lengths(model, example_inputs, program, sites, parsed)
    program = without_single_values(program)
    parts = Parts.of(program, sites)
    shapes = _example(model, program, example_inputs)
    original = model if isinstance(model, torch.nn.Module) else None
    before = summarise(program, shapes, parts=parts, model=original)
    after, record = before, None
    if parsed is not None:
        with meant_for(where):
            small = _pruned(rewrite(program, sites, parsed, model, example_inputs), parsed)
        record = small.record
        followers = [decision.site for decision in record.decisions if decision.action == "follow"]
        after = summarise(small.program, shapes, parts=parts.following(followers), pruned=record.pruned, model=small)
    found = CostReport(
        model=program.name,
        plan="" if parsed is None else str(parsed),
        before=before,
        after=after,
        parts=parts,
        sites=tuple(sites),
        record=record,
        at=tuple(_at(before, _defaults(before, given) | dict(sizes or {}))),
        device=where,
    )
    found.latency(before, "eager", found.at[0])  # which raises where the device lacks a dtype
    return found


def _pruned(small: Rewritten, plan: Plan) -> Rewritten:
    """The model after its priors have been pruned to what the plan aims at."""
    if not any(isinstance(step, Fiak) and (step.scores or step.keys) for step in plan.passes):
        return small
    pruned = prune(small)
    assert isinstance(pruned, Rewritten)
    return pruned


def _device(model: torch.nn.Module | ExportedProgram, device: Device | torch.device | str | None) -> Device:
    """The device that latency is predicted for."""
    if device is not None:
        return Device.of(device)
    tensors = model.state_dict.values() if isinstance(model, ExportedProgram) else model.parameters()
    on = next((tensor.device for tensor in tensors), torch.device("cpu"))
    return Device.of(on) if on.type == "cuda" else Device.typical_cpu()


def _beside(model: torch.nn.Module | ExportedProgram, example_inputs: Any) -> Any:
    """The example inputs on the meta device, where the model is there."""
    if isinstance(model, ExportedProgram) or not any(parameter.is_meta for parameter in model.parameters()):
        return example_inputs
    inputs = normalise_inputs(model, example_inputs)
    return Inputs(*pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), tuple(inputs)))


def _example(
    model: torch.nn.Module | ExportedProgram, program: Program, example_inputs: Any
) -> dict[str, tuple[int, ...]] | None:
    """The shapes of the example inputs as they were given, where a capture may have repeated a batch of 1."""
    if isinstance(model, ExportedProgram):
        return None
    bound = bind(model, normalise_inputs(model, example_inputs))
    shapes = {name: tuple(value.shape) for name, value in bound.items() if isinstance(value, torch.Tensor)}
    return shapes if shapes.keys() == {leaf.name for leaf in program.call.leaves} else None


def _defaults(summary: Summary, example_inputs: Any) -> dict[str, int]:
    """A batch of 1 where nobody gave another."""
    return {"B": 1} if example_inputs is None and "B" in summary.names.sizes else {}


def _at(summary: Summary, sizes: Sizes) -> Iterator[dict[str, int]]:
    """The sizes that a report shows, one after the other.

    Raises:
        InputError: for sizes that are unknown, do not fit, or of which several have several values.
    """
    several = [name for name, value in sizes.items() if isinstance(value, Sequence)]
    if len(several) > 1:
        raise InputError(f"sizes: one of them may have several values, found several for {' and '.join(several)}.")
    running = several[0] if several else "T"
    fixed = {name: value for name, value in sizes.items() if not isinstance(value, Sequence)}
    if running in fixed or (running not in summary.names.sizes and not several):
        yield _filled(summary, fixed)
        return
    if running in sizes:
        for value in sizes[running]:  # type: ignore[union-attr]
            yield _filled(summary, {**fixed, running: value})
        return
    example = _filled(summary, fixed)
    found = list(_fitting(summary, fixed))
    yield from found or [example]


def _fitting(summary: Summary, fixed: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Those of the usual lengths that the model takes."""
    for length in LENGTHS:
        with contextlib.suppress(InputError):
            yield _filled(summary, {**fixed, "T": length})


def _filled(summary: Summary, given: Mapping[str, int]) -> dict[str, int]:
    """All sizes, those that are not given as in the example; but the other lengths of maps are as ``T``.

    Raises:
        InputError: for a size that is unknown or does not fit.
    """
    unknown = [name for name in given if name not in summary.names.sizes]
    if unknown:
        summary.at(**given)  # which says what there is
    decided = {symbol for name in given for symbol in summary.names.sizes[name].free_symbols}
    lengths = {symbol for found in summary.counts.maps for size in found.shape[-2:] for symbol in size.free_symbols}
    example = summary.values_of_example()
    taken = dict(given)
    for name, symbol in summary.symbols.items():
        if symbol not in decided and name not in summary.relations:
            taken[name] = given["T"] if "T" in given and symbol in lengths else example[symbol]
    return {name: size for name, size in summary.at(**taken).sizes.items() if name not in summary.relations}
