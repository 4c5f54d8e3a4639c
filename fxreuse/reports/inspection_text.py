"""The report of `fxreuse inspect`, readable at a glance for 12 layers and for 48: what is alike is said once."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tabulate import tabulate

from ..attention import Rejected
from ..plans.groups import count_layers
from ..ranges import ranges, template

if TYPE_CHECKING:
    from .inspection import InputSizes, InspectedSite, InspectedStack, Inspection

_WIDTH = 120
_HEADERS = ["layers", "attention", "heads", "head dim", "map", "op", "mask", "bias", "layout"]
_MOST_CONDITIONS = 8

_T = TypeVar("_T")


def report(found: Inspection, every: bool) -> str:
    """The whole report. With ``every``, a row for each attention and each rejected softmax."""
    count = sum(len(stack.sites) for stack in found.stacks)
    title = f"{found.model}: {_count(count, 'attention')} in {_count(len(found.stacks), 'stack')}"
    if found.rejected:
        title += f", {_count(len(found.rejected), 'softmax', 'softmaxes')} that {_are(found.rejected)} none"
    parts = [title, _inputs(found, every), *(_stack(stack, every) for stack in found.stacks)]
    if not count and not found.rejected:
        parts.append("its graph has no softmax and no fused attention")
    if found.rejected:
        parts.append("\n".join(["not attention", *_rejected(found.rejected, every)]))
    if found.notes:
        parts.append("\n".join(["notes", *(_wrapped(f"[{note.kind}] {note}") for note in found.notes)]))
    took = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.seconds.items())
    return "\n\n".join([*filter(None, parts), f"took {took}"])


def _inputs(found: Inspection, every: bool) -> str:
    """The inputs, which of their sizes are free and which are fixed, and what free ones have to satisfy."""
    rows = [[i.name, i.dtype, "×".join(map(str, i.example)) or "1 number", _free(i), _fixed(i)] for i in found.inputs]
    lines = [tabulate(rows, ["input", "type", "captured at", "free dimensions", "fixed"], disable_numparse=True)]
    lines += [_wrapped(f"{letter} = {words}") for letter, words in found.letters.items()]
    shown = found.conditions if every else found.conditions[:_MOST_CONDITIONS]
    lines += [_wrapped(f"condition: {text}") for text in shown]
    if len(shown) < len(found.conditions):
        lines.append(f"  and {len(found.conditions) - len(shown)} more conditions (--all)")
    return "\n".join(lines)


def _free(sizes: InputSizes) -> str:
    return ", ".join(f"{dim} ({letter})" if letter else str(dim) for dim, letter in sizes.free.items()) or "none"


def _fixed(sizes: InputSizes) -> str:
    return ", ".join(f"{dim} = {size}" for dim, size in sizes.fixed.items()) or "none"


def _stack(stack: InspectedStack, every: bool) -> str:
    kinds = [[site] for site in stack.sites] if every else _alike(stack.sites, _kind)
    table = tabulate([_row(sites) for sites in kinds], _HEADERS, disable_numparse=True)
    lines = [f"stack {stack.name}: {count_layers(len(stack.sites))}", textwrap.indent(table, "  ")]
    lines += _weights(stack.sites)
    if len(stack.sites) > 1:
        lines += [*_sharing(stack), *_plans(stack)]
    return "\n".join(lines)


def _kind(inspected: InspectedSite) -> Hashable:
    """What a row shows, and the group: sites of which all of it is equal are one row."""
    site = inspected.site
    way = re.sub(r"@\d+|\d+", "", str(site))
    heads = (site.heads, site.kv_heads, site.head_dim, site.value_dim, site.fused)
    return (inspected.group, way, heads, inspected.map_shape, site.mask, site.bias, inspected.layout.text)


def _row(kind: Sequence[InspectedSite]) -> list[str]:
    first = kind[0].site
    return [
        ranges([inspected.site.layer for inspected in kind]),
        template([str(inspected.site) for inspected in kind]),
        str(first.heads) if first.heads == first.kv_heads else f"{first.heads}/{first.kv_heads}",
        str(first.head_dim) if first.head_dim == first.value_dim else f"{first.head_dim}/{first.value_dim}",
        "×".join(kind[0].map_shape),
        "fused" if first.fused else "softmax",
        first.mask,
        first.bias,
        kind[0].layout.text,
    ]


def _weights(sites: Sequence[InspectedSite]) -> list[str]:
    """The weights behind the attentions of a stack; and where their rows cannot be told apart, the reason."""
    lines = []
    for name in ("queries", "keys", "values", "output"):
        paths = list(dict.fromkeys(s.layout.weights[name] for s in sites if name in s.layout.weights))
        named = [template(alike, "i") for alike in _alike(paths, lambda path: re.sub(r"\d+", "", path))]
        missing = [s.site.layer for s in sites if name not in s.layout.weights]
        if missing:
            named.append(f"not known in layers {ranges(missing)}")
        lines.append(f"  {name:8} {', '.join(named)}")
    for name in ("queries", "keys", "values", "output"):
        unread = [s for s in sites if name in s.layout.unread]
        if unread and not (name == "keys" and any("queries" in s.layout.unread for s in unread)):
            layers = ranges([s.site.layer for s in unread])
            reason = _shortened(unread[0].layout.unread[name])
            lines.append(_wrapped(f"  note     layers {layers}: {reason}", indent=11))
    return lines


def _sharing(stack: InspectedStack) -> list[str]:
    """Which layers can share a map."""
    if len(stack.groups) == 1:
        return ["  sharing  any of these layers can share a map: one shape, one mask"]
    first = {inspected.group: inspected for inspected in reversed(stack.sites)}
    several_shapes = len({inspected.map_shape for inspected in stack.sites}) > 1
    groups = [
        f"{ranges(layers)} (mask {first[group].site.mask}"
        + (f", map {'×'.join(first[group].map_shape)})" if several_shapes else ")")
        for group, layers in enumerate(stack.groups)
    ]
    return [_wrapped(f"  sharing  only within {' | '.join(groups)}", indent=11)]


def _plans(stack: InspectedStack) -> list[str]:
    fit = [trial.plan for trial in stack.plans if not trial.refused]
    lines = [f"  plans    {'   '.join(fit)}"] if fit else []
    for alike in _alike([trial for trial in stack.plans if trial.refused], lambda trial: trial.refused):
        plans = ", ".join(trial.plan for trial in alike)
        reason = alike[0].refused.partition(". ")[0]
        lines.append(_wrapped(f"  not      {plans}: {reason}", indent=11))
    return lines


def _rejected(rejected: Sequence[Rejected], every: bool) -> list[str]:
    """A line for each place, the reason, and the line of code; softmaxes of one line of code are one place."""
    places = [[r] for r in rejected] if every else _alike(rejected, lambda r: (r.source, re.sub(r"\d+", "", r.path)))
    lines = []
    for place in places:
        where = template(list(dict.fromkeys(r.path or "(root)" for r in place)))
        count = f" ({len(place)} times)" if len(place) > 1 else ""
        lines.append(_wrapped(f"  {where}{count}: {place[0].reason}"))
        if place[0].source:
            lines.append(f"    {_shortened(place[0].source)}")
    return lines


def _shortened(text: str) -> str:
    """A text with files named from their package, or from the working directory."""
    return re.sub(r"/[^\s()]*/(site|dist)-packages/", "", text).replace(f"{Path.cwd()}/", "")


def _alike(items: Iterable[_T], key: Callable[[_T], Hashable]) -> list[list[_T]]:
    """Items in groups of one key, in the order in which the keys come first."""
    groups: dict[Hashable, list[_T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _wrapped(text: str, indent: int = 4) -> str:
    return textwrap.fill(text, _WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _are(items: Sequence[object]) -> str:
    return "is" if len(items) == 1 else "are"
