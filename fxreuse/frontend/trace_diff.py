"""What a run in training mode does that the run in evaluation mode does not.

Dropouts are looked through: two runs are the same when every other call is, operand by operand.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence

from .mode_modules import ATTENTION
from .op_trace import DROPOUT, Call, Event, Source, Trace

#: A place in the graph: module path with the number of the call, and number among the operations of one kind there.
Place = tuple[str, int]


class Flow:
    """A trace in comparable form: dropouts looked through, idle random numbers left out, sources renumbered.

    ``without`` are events to leave out as well.
    """

    def __init__(self, trace: Trace, without: Collection[int] = ()) -> None:
        self.trace = trace
        ignored = {*without, *_idle_draws(trace)}
        ignored |= {index for index, event in enumerate(trace.events) if event.name in DROPOUT}
        kept = [index for index in range(len(trace.events)) if index not in ignored]
        self.events = [trace.events[index] for index in kept]
        self._numbers = {index: number for number, index in enumerate(kept)}

    @functools.cached_property
    def forms(self) -> list[tuple[str, str, tuple[str, ...], tuple[Source, ...]]]:
        """Every event as path, name, scalars and renumbered sources, and last the results of the model."""
        forms = [(e.path, e.name, e.scalars, tuple(map(self.number, e.sources))) for e in self.events]
        return [*forms, ("", "return", (), tuple(map(self.number, self.trace.results)))]

    def before_dropout(self, source: Source) -> Source:
        """The source in front of the dropouts that this one is the result of."""
        while not isinstance(source, str) and self.trace.events[source[0]].name in DROPOUT:
            source = self.trace.events[source[0]].sources[0]
        return source

    def number(self, source: Source) -> Source:
        """The source in numbers that are the same in another run of the same events."""
        source = self.before_dropout(source)
        if isinstance(source, str):
            return source
        return (self._numbers[source[0]], source[1]) if source[0] in self._numbers else "left out"

    def dropouts(self) -> Iterator[tuple[Event, Source]]:
        """The functional dropouts in order, each with the renumbered source that it is applied to."""
        for event in self.trace.events:
            if event.name in DROPOUT:
                yield event, self.number(event.sources[0])

    def attention_at(self, source: Source) -> Place | None:
        """The place of the softmax that gave this renumbered source, if one did."""
        event = None if isinstance(source, str) else self.events[source[0]]
        return (event.path, event.order) if event and event.name in ATTENTION else None

    def attentions(self) -> dict[Place, float]:
        """The dropout probability of every softmax and fused attention."""
        return {(event.path, event.order): event.probability for event in self.events if event.name in ATTENTION}


def same(evaluation: Flow, training: Flow) -> bool:
    """Whether two runs call the same, apart from dropouts."""
    return evaluation.forms == training.forms


def match_dropouts(evaluation: Flow, training: Flow) -> tuple[dict[Place, float], dict[Place, float], list[Event]]:
    """Sort the functional dropouts of a training run, where the runs are the `same` otherwise.

    Returns:
        The probability of each that the evaluation run has too, by its place there; of each that it has not, but that
        comes straight after a softmax, by the place of the softmax; and the others that it has not.
    """
    by_path: dict[str, tuple[list[tuple[Event, Source]], list[tuple[Event, Source]]]] = defaultdict(lambda: ([], []))
    for side, flow in enumerate((evaluation, training)):
        for event, source in flow.dropouts():
            by_path[event.path][side].append((event, source))
    captured: dict[Place, float] = {}
    after_softmax: dict[Place, float] = {}
    missing = []
    for there, here in by_path.values():
        aligned = len(there) == len(here)
        for event, source in here:
            partner = (
                there[0] if aligned else next((d for d in there if d[0].name == event.name and d[1] == source), None)
            )
            softmax = training.attention_at(source)
            if partner is not None:
                there.remove(partner)
                captured[partner[0].path, partner[0].order] = event.probability
            elif softmax and event.name == "dropout":
                after_softmax[softmax] = event.probability
            elif event.probability:
                missing.append(event)
    return captured, after_softmax, missing


def skipped_calls(evaluation: Trace, training: Trace) -> list[str]:
    """The outermost module calls that the training run leaves out, if it passes on what they take in their place.

    Empty where it differs in anything else, or in nothing.
    """
    gone = [call for path, call in evaluation.calls.items() if path not in training.calls]
    skipped = [call for call in gone if not any(_within(call, other) for other in gone)]
    before = Flow(evaluation, {index for call in skipped for index in range(call.start, call.stop)})
    after = Flow(training)
    results = {before.before_dropout(source): call for call in skipped for source in call.results}

    @functools.cache
    def agree(source: Source, found: Source) -> bool:
        source = before.before_dropout(source)
        number = before.number(source)
        if number == "left out" and source in results:
            return any(agree(taken, found) for taken in results[source].sources)
        return number == found

    def alike(sources: Sequence[Source], others: Sequence[Source]) -> bool:
        return len(sources) == len(others) and all(
            agree(source, after.number(other)) for source, other in zip(sources, others, strict=True)
        )

    if [(e.path, e.name, e.scalars) for e in before.events] != [(e.path, e.name, e.scalars) for e in after.events]:
        return []
    pairs = zip(before.events, after.events, strict=True)
    if not all(alike(one.sources, other.sources) for one, other in pairs):
        return []
    return [call.path for call in skipped] if alike(evaluation.results, training.results) else []


def what_differs(evaluation: Flow, training: Flow) -> tuple[str, set[str]]:
    """A few words on what a training run does differently, and the module calls in which it does."""
    there, here = (Counter((event.path, event.name) for event in flow.events) for flow in (evaluation, training))
    for verb, changed in (("calls", here - there), ("leaves out", there - here)):
        if changed:
            names = list(dict.fromkeys(_READABLE.get(name, name) for _, name in changed))
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            return f"{verb} {', '.join(names[:6])}{more}", {path for path, _ in (here - there) + (there - here)}
    changes = [other for one, other in zip(evaluation.forms, training.forms, strict=True) if one != other]
    path, name, *_ = changes[0]
    text = "gives back something else" if name == "return" else f"calls {name} with other arguments"
    return text, {path}


#: Operators under the names that they have in a graph.
_READABLE = {"__setitem__": "index_put_", "__getitem__": "index"}


def _within(call: Call, other: Call) -> bool:
    """Whether one module call happens inside another."""
    inner, outer = (c.path.partition("@")[0] for c in (call, other))
    return inner.startswith(outer + ".") and other.start <= call.start and call.stop <= other.stop


def _idle_draws(trace: Trace) -> set[int]:
    """The random numbers, and what is computed from them alone, that nothing else uses."""
    chance: set[int] = set()
    users: dict[int, list[int]] = defaultdict(list)
    for source in trace.results:
        if not isinstance(source, str):
            users[source[0]].append(len(trace.events))
    for index, event in enumerate(trace.events):
        origins = [None if isinstance(source, str) else source[0] for source in event.sources]
        if event.random or (origins and chance.issuperset(origins)):
            chance.add(index)
        for origin in origins:
            if origin is not None:
                users[origin].append(index)
    idle: set[int] = set()
    for index in reversed(range(len(trace.events))):
        only_for_draws = index in chance or (users[index] and not trace.events[index].sources)
        if only_for_draws and idle.issuperset(users[index]):
            idle.add(index)
    return idle
