"""Where the time of a model goes, measured: attention, reused attention, feed-forward, convolution, the rest."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable

import torch

from ..checking.node_times import node_times
from ..cost_model.operations import operations
from ..cost_model.parts import PARTS, Parts
from ..emission.emit import emit
from ..emission.rewritten import Rewritten
from ..errors import UnsupportedError
from ..finding.find import find
from ..frontend.load import load_program
from ..passes.fold_modules import fold_modules
from ..program import Program
from ..record import Record

#: Runs a model on the inputs that are measured.
Call = Callable[[torch.nn.Module], object]


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """Seconds of every part, of the original and of the rewritten model; parts that neither has are left out."""

    original: dict[str, float]
    rewritten: dict[str, float]

    @property
    def parts(self) -> list[str]:
        """The parts that take any time, in the order of a table."""
        return [part for part in PARTS if self.original.get(part) or self.rewritten.get(part)]


def measure_breakdown(
    original: torch.nn.Module, rewritten: torch.nn.Module, example_inputs: object, call: Call, rounds: int = 5
) -> Breakdown:
    """Measure how long each part of both models takes.

    The graph that the original is captured as, and that of the rewritten model, are run node by node; the time of a
    node is the median over some calls. Together the parts take a little longer than the whole does in one run.

    Arguments:
        original: the model as it was.
        rewritten: what `fxreuse.apply` made of it.
        example_inputs: those that ``call`` passes; the original is captured with them.
        call: calls a model with them.
        rounds: how many calls are timed.

    Raises:
        UnsupportedError: where the rewritten model's graph does not have the shapes of its values any more.
    """
    if not isinstance(rewritten, Rewritten) or not _has_shapes(rewritten.program):
        raise UnsupportedError(
            f"{type(rewritten).__name__} cannot be broken down into parts: it is not what fxreuse.apply returned in "
            "this process (a saved model keeps no shapes). Apply the plan again."
        )
    program = load_program(original, example_inputs)
    parts = Parts.of(program, find(program))
    same = emit(fold_modules(program), Record("", {}, ()), (), {"": False})
    followers = [decision.site for decision in rewritten.record.decisions if decision.action == "follow"]
    return Breakdown(
        _times(same, parts, call, rounds),
        _times(rewritten, parts.following(followers), call, rounds),
    )


def _has_shapes(program: Program) -> bool:
    return all("val" in node.meta for node in program.graph.nodes if node.op != "output")


def _times(model: Rewritten, parts: Parts, call: Call, rounds: int) -> dict[str, float]:
    """The seconds of each part."""
    measured = node_times(model, lambda: call(model), rounds)
    found: defaultdict[str, float] = defaultdict(float)
    for operation in operations(model.program, parts):
        found[operation.part] += measured.pop((operation.step.path, operation.step.node.name), 0.0)
    found["rest"] += sum(measured.values())  # sizes and other scalars
    return dict(found)
