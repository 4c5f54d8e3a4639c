"""Stacks: the attentions that repeat along one path, such as ``encoder.layer.{i}``."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

_INDEX = "{i}"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an attention is: the module calls around it, outermost first, and whether it is self or cross attention."""

    calls: tuple[str, ...]
    kind: str

    @property
    def path(self) -> str:
        """The innermost call."""
        return self.calls[-1] if self.calls else ""


@dataclasses.dataclass(frozen=True)
class Position:
    """The stack of an attention, its number there, and the module call that is this layer."""

    stack: str
    layer: int
    layer_path: str


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A module call that may be the layer of an attention, and the template along which it would repeat.

    ``inner`` is the way from the layer to the attention, with the number of the attention if that way leads to several.
    """

    layer: str
    template: str
    inner: str


def assign_stacks(places: Sequence[Place]) -> list[Position]:
    """The position of every attention, given in order of execution.

    A layer is the innermost numbered module (``blocks.3``, or ``blocks.3.1`` of lists in a list) whose number varies
    from one attention to another, all else being equal; or else the innermost numbered one that is called several
    times, or the outermost of any name that is. Attentions of which none of this is true make a stack for each module
    that they are in.

    >>> places = [Place((f"layers.{i}", f"layers.{i}.attn"), "self") for i in range(2)]
    >>> for position in assign_stacks(places):
    ...     print(position.stack, position.layer, position.layer_path)
    layers.{i}·self 0 layers.0
    layers.{i}·self 1 layers.1
    """
    candidates = [_candidates(place) for place in _numbered(places)]
    layers: dict[tuple[str, str, str], dict[str, None]] = {}
    for place, options in zip(places, candidates, strict=True):
        for option in options:
            layers.setdefault((option.template, option.inner, place.kind), {})[option.layer] = None
    chosen = [
        next((o for o in options if len(layers[o.template, o.inner, place.kind]) > 1), None) or _alone(place, options)
        for place, options in zip(places, candidates, strict=True)
    ]
    return _positions(places, chosen)


def _numbered(places: Sequence[Place]) -> list[tuple[Place, dict[str, int]]]:
    """Every place with its number among the attentions of each call around it that are reached in the same way."""
    counts: Counter[tuple[str, str]] = Counter()
    result = []
    for place in places:
        numbers = {}
        for call in dict.fromkeys((*place.calls, "")):
            key = (call, _base(place.path))
            numbers[call] = counts[key]
            counts[key] += 1
        result.append((place, numbers))
    return result


def _candidates(numbered: tuple[Place, dict[str, int]]) -> list[_Candidate]:
    """The layers that an attention may belong to, the preferred one first."""
    place, numbers = numbered
    inside_out: list[_Candidate] = []
    by_any_call: list[_Candidate] = []
    above = ""
    for call in place.calls:
        base, _, count = call.partition("@")
        inner = _inner(call, place, numbers[call])
        calls = _Candidate(call, f"{base}@{_INDEX}", inner)
        by_any_call.append(calls)
        templates = _templates(base, above)
        own = [_Candidate(call, f"{t}@{count}" if count else t, inner) for t in templates]
        inside_out = own + ([calls] if base.rpartition(".")[2].isdigit() else []) + inside_out
        above = base
    return inside_out + by_any_call


def _templates(path: str, above: str) -> list[str]:
    """A path with each of its numbers left open, the last one first; those in ``above`` belong to the call around it.

    >>> _templates("stages.0.blocks.3.1", "stages.0")
    ['stages.0.blocks.3.{i}', 'stages.0.blocks.{i}.1']
    """
    parts = path.split(".")
    first = len(above.split(".")) if above and path.startswith(f"{above}.") else 0
    open_at = [place for place in range(len(parts) - 1, first - 1, -1) if parts[place].isdigit()]
    return [".".join((*parts[:place], _INDEX, *parts[place + 1 :])) for place in open_at]


def _inner(call: str, place: Place, number: int) -> str:
    way = _base(place.path)[len(_base(call)) :].lstrip(".")
    return way if number == 0 else f"{way}#{number}"


def _base(path: str) -> str:
    """A path without the numbers of calls."""
    return re.sub(r"@\d+", "", path)


def _alone(place: Place, options: Sequence[_Candidate]) -> _Candidate:
    numbered = [o for o in options if o.template.partition("@")[0].endswith(_INDEX)]
    return numbered[0] if numbered else _Candidate(place.path, place.path, "")


def _positions(places: Sequence[Place], chosen: Sequence[_Candidate]) -> list[Position]:
    """Names, with the way inside the layer where a layer has several attentions of a kind; numbers in order."""
    ways: dict[tuple[str, str], dict[str, None]] = {}
    for place, layer in zip(places, chosen, strict=True):
        ways.setdefault((layer.template, place.kind), {})[layer.inner] = None
    counts: Counter[str] = Counter()
    result = []
    for place, layer in zip(places, chosen, strict=True):
        several = len(ways[layer.template, place.kind]) > 1
        parts = [layer.template, layer.inner] if several else [layer.template]
        stack = f"{_joined(parts)}·{place.kind}"
        result.append(Position(stack, counts[stack], layer.layer))
        counts[stack] += 1
    return result


def _joined(parts: Sequence[str]) -> str:
    text = parts[0] or "(root)"
    for part in filter(None, parts[1:]):
        text += part if part.startswith("#") else f".{part}"
    return text
