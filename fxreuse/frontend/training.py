"""What a model does only in training mode, found by running it in both modes and comparing what it calls.

A capture is made in evaluation mode. From it are missing: the dropout of fused attention, whose probability is 0 there;
layers that are skipped at random; and whatever else a ``forward`` does behind ``if self.training``. The first two are
given as numbers, for a rewrite to put back; anything else is named, with what a user can do about it. Modules that a
capture keeps whole (see `mode_modules`) stay in evaluation mode here: nothing of them is lost.

Runs use fake tensors, which cost no arithmetic, or real ones where the model needs values. They tell the model that it
is being exported: where it asks, it does here what it does in the graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ..record import Note
from .exporting import exporting
from .mode_modules import ATTENTION, marked, reads_training
from .op_trace import Trace, record
from .trace_diff import Flow, Place, match_dropouts, same, skipped_calls, what_differs
from .untouched import one_module_per_path, untouched

#: The ends of what a random number may be: the smallest, and the largest that float32 has below 1.
_LOW, _HIGH = 0.0, 1 - 2**-24

_Modules = Sequence[torch.nn.Module]


@dataclasses.dataclass(frozen=True)
class TrainingFacts:
    """What a model does in training mode that a graph captured in evaluation mode does not show.

    ``attention_dropout`` is the dropout probability of attentions, by module path (``a.b@1`` is the second call of
    ``a.b``) and number among the softmaxes and fused attentions of that module call: of fused ones, and of those whose
    dropout does not exist in evaluation mode. ``functional_dropout`` is the probability in training mode of every
    functional dropout that is in the graph, by path and number among those of the module call; 0 where it is never
    applied. ``layerdrop`` is the probability with which a layer is skipped. ``lost`` names all the rest.
    """

    attention_dropout: Mapping[Place, float] = dataclasses.field(default_factory=dict)
    functional_dropout: Mapping[Place, float] = dataclasses.field(default_factory=dict)
    layerdrop: Mapping[str, float] = dataclasses.field(default_factory=dict)
    lost: tuple[Note, ...] = ()


def probe(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TrainingFacts:
    """Find out what a model does only in training mode.

    Arguments:
        model: any module; it is left as it was.
        args: example positional arguments.
        kwargs: example keyword arguments.

    Returns:
        The facts. A model that cannot be run with these arguments gives one note in ``lost``, which says so.

    >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    >>> facts = probe(layer, (torch.randn(2, 5, 8),), {})
    >>> dict(facts.attention_dropout), facts.lost
    ({('self_attn', 0): 0.2}, ())
    """
    try:
        with one_module_per_path(model), marked(model, _copied) as kept_whole, _quiet():
            return _Probe(model, args, kwargs).facts(kept_whole)
    except Exception as error:
        text = f"what it does in training mode could not be found out: {_said(error)}"
        remedy = "check its forward for code that reads self.training"
        return TrainingFacts(lost=(Note("training", type(model).__name__, text, remedy),))


@dataclasses.dataclass
class _Finding:
    """What some modules do in training mode.

    ``problem`` says in words what cannot be given as numbers, ``where`` the paths of the module calls that it shows in.
    """

    attention: dict[Place, float] = dataclasses.field(default_factory=dict)
    functional: dict[Place, float] = dataclasses.field(default_factory=dict)
    layerdrop: dict[str, float] = dataclasses.field(default_factory=dict)
    problem: str = ""
    where: set[str] = dataclasses.field(default_factory=set)


class _Unexplained(Exception):
    """A difference between training and evaluation that is none of those that can be put back, and where it shows."""


class _Probe:
    """The runs of one model."""

    def __init__(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.paths = {module: path for path, module in model.named_modules()}
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._fake = functools.cache(self.fakes.from_tensor)
        self.evaluation = functools.cache(self._evaluation)
        self.ways: tuple[bool, ...] = (True, False)
        try:
            self.evaluation(_HIGH, True)
        except Exception:
            self.evaluation(_HIGH, False)
            self.ways = (False,)

    def run(self, trained: _Modules, draw: float, fake: bool) -> Trace:
        """One run, with fake or real tensors and the given modules in training mode."""

        def own(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return self.fakes.from_tensor(leaf).detach() if fake else leaf.detach().clone()

        args, kwargs = pytree.tree_map(own, (self.args, dict(self.kwargs)))
        with (
            untouched(self.model),
            exporting(),
            torch.set_grad_enabled(fake),
            self.fakes if fake else contextlib.nullcontext(),
        ):
            if fake:
                self._put_fake_parameters()
            _seed()
            for module in self.paths:
                module.training = False
            for module in trained:
                module.training = True
            return record(self.model, args, kwargs, draw)

    def _evaluation(self, draw: float, fake: bool) -> Flow:
        """The run in evaluation mode. Where it takes no random number, it is the same whatever they are."""
        if draw != _HIGH and not self.evaluation(_HIGH, fake).trace.drew:
            return self.evaluation(_HIGH, fake)
        return Flow(self.run((), draw, fake))

    def _put_fake_parameters(self) -> None:
        """Fake parameters in place of real ones: made once, where a run would make them anew for every operator."""
        for module in self.paths:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = self._fake(parameter)

    def facts(self, kept_whole: Mapping[str, torch.nn.Module]) -> TrainingFacts:
        """What all modules do that a capture does not keep whole."""
        evaluation = self.evaluation(_HIGH, self.ways[0])
        attention = evaluation.attentions()
        functional = {(event.path, event.order): event.probability for event, _ in evaluation.dropouts()}
        layerdrop: dict[str, float] = {}
        findings = self._findings([module for module, path in self.paths.items() if path not in kept_whole])
        for _, finding in findings:
            attention.update(finding.attention)
            functional.update(finding.functional)
            layerdrop.update(finding.layerdrop)
        lost = [(modules, finding.problem) for modules, finding in findings if finding.problem]
        occupied = [self.paths[module] for modules, _ in lost for module in modules]
        target = _most_attentions(evaluation.trace, without=occupied)
        return TrainingFacts(
            attention_dropout={place: probability for place, probability in attention.items() if probability},
            functional_dropout=functional,
            layerdrop=layerdrop,
            lost=tuple(self._note(modules, problem, target) for modules, problem in lost),
        )

    def _findings(self, modules: _Modules) -> Sequence[tuple[_Modules, _Finding]]:
        """All modules at once; where that leaves questions, class by class.

        Where all that is left of them is one class, and they show in its own calls, the run of all has its answer.
        """
        together = self.finding(modules)
        if not together.problem:
            return [(modules, together)]
        groups: dict[type, list[torch.nn.Module]] = {}
        for module in modules:
            groups.setdefault(type(module), []).append(module)
        where = {path.partition("@")[0] for path in together.where}
        shown = {type(module) for module in modules if self.paths[module] in where}
        readers = {kind for kind in groups if reads_training(kind)}
        for suspects in (shown, readers, groups.keys()):
            rest = [module for module in modules if type(module) not in suspects]
            if rest == modules:
                continue
            findings = [(rest, self.finding(rest))] if rest else []
            if not findings or not findings[0][1].problem:
                suspected = [group for kind, group in groups.items() if kind in suspects]
                alone = len(suspected) == 1 and where and where <= {self.paths[module] for module in suspected[0]}
                findings += [(group, together if alone else self.finding(group)) for group in suspected]
                break
        if not any(finding.problem for _, finding in findings):
            findings.append(([self.model], together))
        return findings

    def finding(self, modules: _Modules) -> _Finding:
        """What these modules do in training mode, all others in evaluation mode."""
        problem = ""
        for fake in self.ways:
            try:
                return self._compare(modules, fake)
            except Exception as error:
                problem = f"could not be run in training mode: {_said(error)}"
        return _Finding(problem=problem)

    def _compare(self, modules: _Modules, fake: bool) -> _Finding:
        runs = {_HIGH: self.run(modules, _HIGH, fake)}
        if runs[_HIGH].drew:
            runs[_LOW] = self.run(modules, _LOW, fake)
        pairs = {draw: (self.evaluation(draw, fake), Flow(run)) for draw, run in runs.items()}
        steady = [draw for draw, pair in pairs.items() if same(*pair)]
        finding = _Finding()
        try:
            if not steady:
                raise _Unexplained(*what_differs(*pairs[_HIGH]))
            finding = _dropouts(*pairs[steady[0]])
            for draw in pairs.keys() - steady:
                finding.layerdrop = self._layerdrop(modules, draw, runs, fake)
        except _Unexplained as reason:
            finding.attention = _attention(*pairs[(steady or [_HIGH])[0]])
            text, finding.where = reason.args
            finding.problem = f"does something in training mode that the capture does not show: {text}"
        return finding

    def _layerdrop(
        self, modules: _Modules, skipping: float, runs: Mapping[float, Trace], fake: bool
    ) -> dict[str, float]:
        """The probability with which each layer is skipped that a random number of ``skipping`` makes go away."""

        def skipped(draw: float, run: Trace) -> list[str]:
            evaluation, training = self.evaluation(draw, fake), Flow(run)
            paths = skipped_calls(evaluation.trace, run)
            if not paths and not same(evaluation, training):
                raise _Unexplained(*what_differs(evaluation, training))
            return paths

        layers = skipped(skipping, runs[skipping])
        met = sorted({number for run in runs.values() for number in run.thresholds if 0 < number < 1})
        if not met:
            raise _Unexplained(f"skips {layers[0]} at random, with a probability that could not be read", set(layers))
        if skipping == _HIGH:
            met.reverse()
        found: dict[str, float] = {}
        for number, following in itertools.zip_longest(met, met[1:]):
            draw = None if following is None else (number + following) / 2
            still = [] if draw is None else skipped(draw, self.run(modules, draw, fake))
            for layer in layers:
                if layer not in still:
                    found.setdefault(layer, number if skipping == _LOW else round(1 - number, 12))
        return found

    def _note(self, modules: _Modules, problem: str, target: str) -> Note:
        path, kind = self.paths[modules[0]], type(modules[0]).__name__
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        if target:
            remedy = f"capture only what holds the attentions with target={target!r}, so that this code stays as it is"
        else:
            remedy = "capture only a submodule without this code with target=, or do without what it does"
        return Note("training", (f"{path} ({kind})" if path else kind) + more, problem, remedy)


def _dropouts(evaluation: Flow, training: Flow) -> _Finding:
    """The probabilities that differ, of two runs that are the same otherwise."""
    captured, after_softmax, missing = match_dropouts(evaluation, training)
    if missing:
        first = missing[0]
        where = f" in {first.path}" if first.path else ""
        text = f"applies {first.name} with probability {first.probability:g}{where}"
        raise _Unexplained(text, {dropout.path for dropout in missing})
    before = {(event.path, event.order): event.probability for event, _ in evaluation.dropouts()}
    functional = {place: p for place, p in captured.items() if p != before[place]}
    return _Finding({**_attention(evaluation, training), **after_softmax}, functional)


def _attention(evaluation: Flow, training: Flow) -> dict[Place, float]:
    """The dropout probabilities of fused attentions that differ, if the runs have the same attentions."""
    before, after = evaluation.attentions(), training.attentions()
    return {place: p for place, p in after.items() if p != before[place]} if before.keys() == after.keys() else {}


def _most_attentions(trace: Trace, without: Sequence[str]) -> str:
    """The path of the outermost module that runs most of the attentions and none of some other modules; '' if none."""
    attentions = [event.path.partition("@")[0] for event in trace.events if event.name in ATTENTION]
    best, most = "", 1
    for path in trace.calls:
        free = path and "@" not in path and not any(_inside(other, path) for other in without)
        count = sum(_inside(attention, path) for attention in attentions) if free else 0
        if count > most:
            best, most = path, count
    return best


def _inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith(outer + ".")


def _copied(x: torch.Tensor, path: str) -> torch.Tensor:
    """Stands in for a module that is kept whole: a tensor of its own, as an operator would give."""
    return x.clone()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, and no report of an operator that fake tensors cannot run: real ones take their place."""
    log = logging.getLogger(FakeTensorMode.__module__)
    disabled, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = disabled


def _seed() -> None:
    torch.default_generator.manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
