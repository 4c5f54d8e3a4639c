"""What `fxreuse.report` found: the costs of a model before and after a plan, as data and for people."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sympy

from ..attention import AttentionSite
from ..cost_model.device import Device
from ..cost_model.latency import Prediction, predict
from ..cost_model.parts import PARTS, Parts
from ..cost_model.summary import Numbers, Summary
from ..length_text import length_text
from ..priors.pruning import SitePruning
from ..record import Record
from .cost_tables import CONVENTION, render
from .decoding import Decoding, decoding

#: The ways of running a model that latency is predicted for.
WAYS = ("eager", "compiled")


@dataclasses.dataclass(frozen=True)
class Row:
    """One quantity at every size of a report: what the model has of it before and after."""

    name: str
    unit: str
    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Before over after."""
        pairs = zip(self.before, self.after, strict=True)
        return tuple(before / after if after else 1.0 for before, after in pairs)


@dataclasses.dataclass(frozen=True)
class Saving:
    """What the modules of one place save: ``module`` has ``{i}`` for the number of a layer, ``count`` says how many."""

    module: str
    count: int
    params: int
    macs: sympy.Expr


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a model (see `cost_model.parts.PARTS`): its parameters, its MACs, and the seconds predicted of it."""

    name: str
    params: int
    macs: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class CostReport:
    """The costs of a model and of what a plan makes of it. Printing it gives tables.

    ``before`` and ``after`` have ``.params``, and ``.macs``, ``.map_bytes``, ``.weight_bytes`` and more as expressions
    in the sizes; ``.at(B=1, T=512)`` gives numbers, ``.at(…).peak_bytes`` among them. ``at`` are the sizes that the
    tables show, ``device`` is what latency is predicted for. Without a plan ``after`` is ``before``.
    """

    model: str
    plan: str
    before: Summary
    after: Summary
    parts: Parts
    sites: tuple[AttentionSite, ...]
    record: Record | None
    at: tuple[Mapping[str, int], ...]
    device: Device

    @functools.cached_property
    def numbers(self) -> tuple[tuple[Numbers, Numbers], ...]:
        """Before and after at every size of the tables."""
        found = []
        for sizes in self.at:
            before = self.before.at(**sizes)
            found.append((before, before if self.after is self.before else self.after.at(**sizes)))
        return tuple(found)

    @property
    def running(self) -> str:
        """The size that differs from column to column: ``T`` as a rule."""
        first, *others = (self._shown(numbers) for numbers, _ in self.numbers)
        different = [name for name in first if any(other[name] != first[name] for other in others)]
        return "T" if not different or "T" in different else different[0]

    def columns(self) -> list[int]:
        """The values of the size that differs."""
        return [numbers.sizes.get(self.running, 0) for numbers, _ in self.numbers]

    def fixed(self) -> dict[str, int]:
        """The sizes that are the same in every column."""
        first, *others = (self._shown(numbers) for numbers, _ in self.numbers)
        return {name: size for name, size in first.items() if all(other[name] == size for other in others)}

    @staticmethod
    def _shown(numbers: Numbers) -> dict[str, int]:
        return dict(numbers.sizes)

    @functools.cached_property
    def rows(self) -> tuple[Row, ...]:
        """The quantities that depend on sizes."""

        def row(name: str, unit: str, field: str) -> Row:
            before, after = zip(*((getattr(b, field), getattr(a, field)) for b, a in self.numbers), strict=True)
            return Row(name, unit, before, after)

        pruned = self.after.macs_algorithmic != self.after.macs
        return (
            row("MACs", "MAC", "macs"),
            *([row("MACs, as pruned", "MAC", "macs_algorithmic")] if pruned else []),
            row("attention maps, written out", "B", "map_bytes"),
            row("bytes moved", "B", "bytes_moved"),
            row("peak memory", "B", "peak_bytes"),
            *(Row(f"latency, {way}", "s", *self._latencies(way)) for way in WAYS),
        )

    def _latencies(self, way: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        before = self._seconds(self.before, way)
        return before, before if self.after is self.before else self._seconds(self.after, way)

    def _seconds(self, summary: Summary, way: str) -> tuple[float, ...]:
        return tuple(self.latency(summary, way, sizes).seconds for sizes in self.at)

    def latency(self, summary: Summary, way: str, sizes: Mapping[str, int]) -> Prediction:
        """The predicted latency of ``before`` or ``after``, ``"eager"`` or ``"compiled"``, at some sizes.

        Raises:
            InputError: for sizes that do not fit, or a dtype that the device lacks.
        """
        return predict(summary.operations, summary.values(**sizes), self.device, compiled=way == "compiled")

    @functools.cached_property
    def savings(self) -> tuple[Saving, ...]:
        """Which modules save parameters and multiply-accumulates, the most first; negative where a plan adds some."""
        before, after = self.before.counts, self.after.counts
        params = _difference(before.params_by_module, after.params_by_module)
        macs = _difference(before.macs_by_module, after.macs_by_module)
        grouped: defaultdict[str, list[str]] = defaultdict(list)
        for path in params | macs:
            if params.get(path, 0) or macs.get(path, 0):
                grouped[_template(path)].append(path)
        found = [
            Saving(
                template,
                len(paths),
                sum(params.get(path, 0) for path in paths),
                sympy.expand(sum(macs.get(path, 0) for path in paths)),
            )
            for template, paths in grouped.items()
        ]
        numbers = {symbol: sympy.Integer(size) for symbol, size in self.before.values(**self.at[-1]).items()}
        return tuple(sorted(found, key=lambda s: (-int(sympy.sympify(s.macs).xreplace(numbers)), -s.params)))

    def breakdown(self, **sizes: int) -> dict[str, tuple[Part, ...]]:
        """Parameters, MACs and predicted time of every part of the model, ``"before"`` and ``"after"``.

        Arguments:
            sizes: as of `Summary.at`; the largest of the tables where left out.
        """
        followers = [] if self.record is None else [d.site for d in self.record.decisions if d.action == "follow"]
        pairs = {"before": (self.before, self.parts), "after": (self.after, self.parts.following(followers))}
        return {
            name: tuple(self._parts(summary, parts, sizes or self.at[-1])) for name, (summary, parts) in pairs.items()
        }

    def _parts(self, summary: Summary, parts: Parts, sizes: Mapping[str, int]) -> list[Part]:
        numbers = {symbol: sympy.Integer(size) for symbol, size in summary.values(**sizes).items()}
        params = dict.fromkeys(PARTS, 0)
        for path, count in summary.counts.params_by_module.items():
            params[parts.of_module(path) or parts.of_layer(path)] += count
        macs = {name: int(amount.xreplace(numbers)) for name, amount in summary.counts.macs_by_part.items()}
        seconds = self.latency(summary, "eager", sizes).by(lambda operation: operation.part)
        return [Part(name, params[name], macs.get(name, 0), seconds.get(name, 0.0)) for name in PARTS]

    @functools.cached_property
    def decoding(self) -> Decoding | None:
        """What one more token costs against a past of ``S``; None where the model is no causal language model."""
        return decoding(self.before, self.after, self.sites, self.record)

    def to_markdown(self) -> str:
        """The tables in Markdown."""
        return render(self, "github")

    def __str__(self) -> str:
        return render(self, "simple")

    def to_json(self, indent: int | None = 2) -> str:
        """Everything, as JSON: formulas as text, and numbers at the sizes of the tables."""
        found = {
            "model": self.model,
            "plan": self.plan,
            "device": self.device.name,
            "convention": " ".join(CONVENTION),
            "relations": {name: length_text(length) for name, length in self.before.relations.items()},
            "before": _totals(self.before),
            "after": _totals(self.after),
            "sizes": [dict(numbers.sizes) for numbers, _ in self.numbers],
            "rows": [dataclasses.asdict(row) | {"ratios": row.ratios} for row in self.rows],
            "savings": [dataclasses.asdict(saving) | {"macs": str(saving.macs)} for saving in self.savings],
            "breakdown": {name: [dataclasses.asdict(p) for p in parts] for name, parts in self.breakdown().items()},
            "pruned": [] if self.record is None else [_pruned(site) for site in self.record.pruned],
            "decoding": None if self.decoding is None else self.decoding.as_text(),
        }
        return json.dumps(found, indent=indent, ensure_ascii=False)

    def plot(self, path: str | Path) -> None:
        """Draw MACs, memory and latency against the length, before and after, into a PNG or SVG file.

        Raises:
            UnsupportedError: matplotlib is not installed.
            InputError: for a file that is no picture, or a report of one length.
        """
        from .cost_plot import draw

        draw(self, Path(path))


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """By path, without the numbers of calls."""
    found: defaultdict[str, Any] = defaultdict(int)
    for sign, counts in ((1, before), (-1, after)):
        for path, amount in counts.items():
            found[path.replace("@0", "")] += sign * amount
    return {path: sympy.expand(amount) if isinstance(amount, sympy.Expr) else amount for path, amount in found.items()}


def _pruned(site: SitePruning) -> dict[str, Any]:
    """What is left of a site, and the share of its pruned scores that the lowering does not compute."""
    counts = ("site", "keys", "keys_kept", "scores", "scores_kept", "skipped_share", "lowering")
    return {name: getattr(site, name) for name in counts}


def _template(path: str) -> str:
    """A path with ``{i}`` for every number.

    >>> _template("encoder.layer.11.attention")
    'encoder.layer.{i}.attention'
    """
    return re.sub(r"(?<=[.@])\d+(?=\.|@|$)", "{i}", path)


def _totals(summary: Summary) -> dict[str, Any]:
    return {
        "params": summary.params,
        "weight_bytes": int(summary.weight_bytes),
        "weights": {str(dtype).removeprefix("torch."): size for dtype, size in summary.weights.items()},
        "macs": str(summary.macs),
        "macs_algorithmic": str(summary.macs_algorithmic),
        "macs_training": str(summary.macs_training),
        "macs_by_kind": {kind: str(macs) for kind, macs in summary.counts.macs_by_kind.items()},
        "map_bytes": str(summary.map_bytes),
        "bytes_moved": str(summary.bytes_moved),
        "bytes_training": str(summary.bytes_training),
    }
