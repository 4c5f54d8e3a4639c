"""What a rewrite decided, site by site, and what it removed and added: the data behind `fxreuse.describe`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from .priors.pruning import SitePruning, pruning_table


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was done with one attention site, and why.

    ``action`` is ``"keep"`` (computes its own map, nobody else uses it), ``"lead"`` (computes the map of its group),
    ``"follow"`` (uses the map of ``leader``), ``"weigh"`` (its keys have priors), ``"prune"`` (was pruned by them) or
    ``"skip"`` (left alone; ``reason`` says why).
    """

    site: str
    stack: str
    layer: int
    action: str
    leader: str | None = None
    lowering: str | None = None
    reason: str = ""
    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SharedMatrix:
    """What was done with one weight matrix of one layer.

    ``weight`` is the path that its parameter has in the original, ``role`` what it makes (``"query"``, ``"key"``,
    ``"value"``, empty for anything else) and ``shape`` its inputs and outputs. ``place`` numbers the places of the
    layer's projections, and ``group`` is the first layer of its group. ``shared`` is the path of the weight U that it
    reads now. ``residual`` has the paths of A, B and D of its own, as far as it has them, ``rank`` that of A B, and
    ``lowering`` how they are computed, for a ``reason``. ``error`` is ‖W − U − AB − D‖ / ‖W‖ in Frobenius norms, and
    ``bias_error`` the same of the bias, where they were fitted. ``axis`` is the axis of outputs in the parameter, and
    ``rows`` and ``shared_rows`` are the indices there that make it, in the original and in the shared weight.
    """

    weight: str
    role: str
    stack: str
    layer: int
    place: int
    group: int
    shape: tuple[int, int]
    shared: str
    axis: int
    rows: Sequence[int]
    shared_rows: Sequence[int]
    bias: str | None = None
    shared_bias: str | None = None
    residual: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rank: int = 0
    lowering: str | None = None
    reason: str = ""
    error: float | None = None
    bias_error: float | None = None


@dataclasses.dataclass(frozen=True)
class FitError:
    """How far the outputs are from those before a fit, on the example inputs, relative in Frobenius norms.

    ``weights`` is what the fitted weights cause alone, with every layer's own biases, and ``biases`` what shared biases
    cause alone, with every layer's own weights.
    """

    stack: str
    output: float
    weights: float
    biases: float


@dataclasses.dataclass(frozen=True)
class Note:
    """Something about the capture that its user has to know.

    ``kind`` is ``"training"`` (behaviour in training mode that the rewritten model does not have), ``"size"`` (a
    dimension that was specialised), ``"mask"`` (a mask that was proved trivial), ``"layerdrop"`` (layers that it
    spares), ``"outline"`` (a layer that stayed in the flat graph), ``"cost"`` (something that undoes what reuse
    saves), ``"fit"`` (what residuals start from) or ``"capture"``.
    """

    kind: str
    where: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" + (f" ({self.remedy})" if self.remedy else "")


@dataclasses.dataclass(frozen=True)
class Record:
    """The record of a rewrite: plan, stacks, one decision per site, parameters removed and added.

    Printing it gives a table.
    """

    plan: str
    stacks: Mapping[str, int]
    decisions: tuple[Decision, ...]
    removed: Mapping[str, int] = dataclasses.field(default_factory=dict)
    added: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    buffers_removed: tuple[str, ...] = ()
    matrices: tuple[SharedMatrix, ...] = ()
    fits: tuple[FitError, ...] = ()
    pruned: tuple[SitePruning, ...] = ()

    @property
    def parameters_removed(self) -> int:
        """Number of scalar parameters that the rewritten model does not have any more."""
        return sum(self.removed.values())

    @property
    def parameters_added(self) -> int:
        """Number of scalar parameters that the rewritten model has in addition."""
        return sum(self.added.values())

    def __str__(self) -> str:
        rows = [[d.layer, d.site, d.action, d.leader or "", d.lowering or ""] for d in self.decisions]
        headers = ["layer", "site", "action", "leader", "lowering"]
        table = [tabulate(rows, headers=headers, disable_numparse=True)] if rows else []
        reasons = dict.fromkeys(f"{d.lowering}: {d.reason}" for d in self.decisions if d.lowering)
        lines = [
            f"plan {self.plan}",
            "stacks " + ", ".join(f"{name} ({count} layers)" for name, count in self.stacks.items()),
            *table,
            *reasons,
            *self._weights(),
            f"parameters removed {self.parameters_removed:,}, added {self.parameters_added:,}",
        ]
        lines += [pruning_table(self.pruned)] if self.pruned else []
        lines += [f"note [{note.kind}] {note}" for note in self.notes]
        return "\n".join(lines)

    def _weights(self) -> list[str]:
        """A table of the shared weights, a line for each place and role, and what a fit changes in the outputs."""
        places: dict[tuple[str, int, str], list[SharedMatrix]] = {}
        for one in self.matrices:
            places.setdefault((one.stack, one.place, one.role), []).append(one)
        rows = []
        for found in places.values():
            first = found[0]
            errors = [one.error for one in found if one.error is not None]
            row = [first.weight + (f" ({first.role})" if first.role else ""), "×".join(map(str, first.shape))]
            row += [str(len(found)), str(len({(one.shared, tuple(one.shared_rows)) for one in found}))]
            row += [str(first.rank or ""), "yes" if "D" in first.residual else "no", first.lowering or ""]
            row += [f"{sum(errors) / len(errors):.3g} ({max(errors):.3g})" if errors else ""]
            rows.append(row)
        headers = ["weight, first layer", "shape", "layers", "weights", "rank", "diagonal", "lowering", "error (worst)"]
        lines = [tabulate(rows, headers=headers, disable_numparse=True)] if rows else []
        lines += [
            f"outputs of {fit.stack}: relative error {fit.output:.3g}; of the weights alone {fit.weights:.3g}, "
            f"of shared biases alone {fit.biases:.3g}"
            for fit in self.fits
        ]
        return lines
