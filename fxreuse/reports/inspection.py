"""What `fxreuse inspect` finds out about a model: its attentions, its sizes, and the plans that it takes."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from ..attention import AttentionSite, Rejected
from ..errors import FxReuseError
from ..finding.find import find
from ..frontend.load import load_program
from ..frontend.target import captured_inputs
from ..layouts.layout_names import Layout, LayoutNames
from ..passes.lay_reuse import lay_reuse
from ..plans.groups import fitting
from ..plans.plan import Plan, Reuse
from ..program import Guard, Program, fixed_size
from ..record import Note
from . import inspection_text


@dataclasses.dataclass(frozen=True)
class InputSizes:
    """The sizes of one input: ``free`` dimensions by their letters, ``fixed`` ones, which capture specialised."""

    name: str
    dtype: str
    example: tuple[int, ...]
    free: Mapping[int, str]
    fixed: Mapping[int, int]


@dataclasses.dataclass(frozen=True)
class InspectedSite:
    """One attention. ``map_shape`` is in letters; ``group`` counts the kinds of map (shape, mask) in its stack."""

    site: AttentionSite
    map_shape: tuple[str, ...]
    layout: Layout
    group: int


@dataclasses.dataclass(frozen=True)
class Trial:
    """A plan that was tried on a stack; ``refused`` has the reason where it does not fit."""

    plan: str
    refused: str = ""


@dataclasses.dataclass(frozen=True)
class InspectedStack:
    """The attentions of a stack, and plans that were tried on it."""

    name: str
    sites: tuple[InspectedSite, ...]
    plans: tuple[Trial, ...]

    @property
    def groups(self) -> list[list[int]]:
        """The layers whose maps have the same shape and the same mask: only those can share one."""
        groups: dict[int, list[int]] = {}
        for inspected in self.sites:
            groups.setdefault(inspected.group, []).append(inspected.site.layer)
        return list(groups.values())


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Everything that was found. Prints as a report for people; `to_json` gives all of it as data.

    ``letters`` says what the letters of sizes stand for, ``conditions`` what the sizes of a call have to satisfy.
    """

    model: str
    inputs: tuple[InputSizes, ...]
    letters: Mapping[str, str]
    conditions: tuple[str, ...]
    stacks: tuple[InspectedStack, ...]
    rejected: tuple[Rejected, ...]
    notes: tuple[Note, ...]
    seconds: Mapping[str, float]

    def __str__(self) -> str:
        return self.report()

    def report(self, *, every: bool = False) -> str:
        """The text that printing gives; with ``every``, a row for each attention in place of one for each kind."""
        return inspection_text.report(self, every)

    def to_json(self) -> str:
        """All of it as JSON, attention by attention."""
        data = {
            "model": self.model,
            "inputs": [dataclasses.asdict(sizes) for sizes in self.inputs],
            "letters": dict(self.letters),
            "conditions": list(self.conditions),
            "stacks": [
                {
                    "name": stack.name,
                    "can_share": stack.groups,
                    "plans": [dataclasses.asdict(trial) for trial in stack.plans],
                    "attentions": [_site_data(inspected) for inspected in stack.sites],
                }
                for stack in self.stacks
            ],
            "not_attention": [dataclasses.asdict(rejected) for rejected in self.rejected],
            "notes": [dataclasses.asdict(note) for note in self.notes],
            "seconds": dict(self.seconds),
        }
        return json.dumps(data, indent=2, ensure_ascii=False)


def inspect_model(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    target: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Inspection:
    """Capture a model, find its attentions, and try plans on their stacks.

    Arguments are those of `fxreuse.apply`; ``progress`` is called with a line of text as each step begins. Nothing is
    changed.

    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> found = inspect_model(torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False))
    >>> [(stack.name, len(stack.sites), stack.sites[0].layout.text) for stack in found.stacks]
    [('layers.{i}·self', 4, 'qkv fused, thirds')]
    >>> [trial.plan for trial in found.stacks[0].plans if not trial.refused]
    ['2x2', '4x1', '2x*']
    """
    say = progress or _silent
    seconds: dict[str, float] = {}
    begun = time.perf_counter()

    def timed(name: str) -> None:
        nonlocal begun
        seconds[name] = round(time.perf_counter() - begun, 3)
        begun = time.perf_counter()

    say("capturing the model")
    if target is not None:
        model, example_inputs = captured_inputs(model, target, example_inputs)
    program = load_program(model, example_inputs)
    timed("capture")
    say("finding its attentions")
    sites = find(program)
    timed("find")
    say("reading the layouts of their weights")
    names = LayoutNames(program)
    layouts = {site.nodes.map: names.of(site) for site in sites}
    timed("layouts")
    letters = sites.letters()
    stacks = []
    for name, members in sites.stacks.items():
        say(f"trying plans on {name}")
        known = [_inspected(site, layouts[site.nodes.map], letters, members) for site in members]
        stacks.append(InspectedStack(name, tuple(known), tuple(_trials(program, members, known))))
    timed("plans")
    return Inspection(
        model=program.name,
        inputs=_input_sizes(program, letters),
        letters={letter: sites.in_words(size) for size, letter in letters.items()},
        conditions=tuple(dict.fromkeys(filter(None, map(_condition, program.guards)))),
        stacks=tuple(stacks),
        rejected=sites.rejected,
        notes=program.notes,
        seconds=seconds,
    )


def _silent(_: str) -> None:
    """Say nothing."""


def _inspected(
    site: AttentionSite, layout: Layout, letters: Mapping[str, str], members: Sequence[AttentionSite]
) -> InspectedSite:
    groups = list(dict.fromkeys(map(_kind_of_map, members)))
    shape = tuple(letters.get(str(size), str(size)) for size in site.map_shape)
    return InspectedSite(site, shape, layout, groups.index(_kind_of_map(site)))


def _kind_of_map(site: AttentionSite) -> tuple[Any, ...]:
    return (*(str(size) for size in site.map_shape), site.mask_key)


def _trials(program: Program, members: Sequence[AttentionSite], known: Sequence[InspectedSite]) -> list[Trial]:
    """Plans that a person would think of first, each tried; and one within the groups where the stack has several."""
    plans = [plan for plan in fitting(len(members)) if plan != "1x*"]
    if len({inspected.group for inspected in known}) > 1:
        leaders = _in_pairs([inspected.group for inspected in known])
        if any(layer != leader for layer, leader in enumerate(leaders)):
            plans.append(f"leaders={','.join(map(str, leaders))}")
    return [Trial(plan, _refusal(program, members, plan)) for plan in plans]


def _in_pairs(groups: Sequence[int]) -> list[int]:
    """For every layer the leader that it has where the layers of a group share in twos.

    >>> _in_pairs([0, 1, 0, 1, 0])
    [0, 1, 0, 1, 4]
    """
    waiting: dict[int, int] = {}
    leaders = []
    for layer, group in enumerate(groups):
        leader = waiting.pop(group, None)
        if leader is None:
            waiting[group] = layer
        leaders.append(layer if leader is None else leader)
    return leaders


def _refusal(program: Program, members: Sequence[AttentionSite], plan: str) -> str:
    """Why a stack does not take a plan; empty where it does."""
    [step] = Plan.parse(plan).passes
    assert isinstance(step, Reuse)
    try:
        lay_reuse(program, members, step.groups.leaders(len(members)), step)
    except FxReuseError as error:
        return str(error)
    return ""


def _input_sizes(program: Program, letters: Mapping[str, str]) -> tuple[InputSizes, ...]:
    found = []
    for leaf, node in zip(program.call.leaves, program.graph.find_nodes(op="placeholder"), strict=True):
        value = node.meta["val"]
        free: dict[int, str] = {}
        fixed: dict[int, int] = {}
        example = []
        for dim, size in enumerate(value.shape):
            number = fixed_size(size)
            if number is None:
                free[dim] = letters.get(str(size.node.expr), "")
                example.append(int(size.node.hint))
            else:
                fixed[dim] = number
                example.append(number)
        dtype = str(value.dtype).removeprefix("torch.")
        found.append(InputSizes(leaf.name, dtype, tuple(example), free, fixed))
    return tuple(found)


def _condition(guard: Guard) -> str:
    """What a guard asks for, in words; nothing where it only fixes one dimension, or waives all that it forbids.

    >>> from ..frontend.guards import make_guard
    >>> _condition(make_guard('size("x", 1) == 8')), _condition(make_guard('size("x", 1) <= 64'))
    ('', 'x: dimension 1 must be at most 64')
    """
    if re.fullmatch(r'size\("[^"]*", \d+\) == \d+', guard.source):
        return ""
    waived = re.fullmatch(r'(size\("[^"]*", 0\)) == 1 or \((.*)\)', guard.source)
    if waived is None:
        return guard.text
    return "" if waived[2] in (f"{waived[1]} != 1", f"{waived[1]} > 1") else f"{guard.text}, or the batch is 1"


def _site_data(inspected: InspectedSite) -> dict[str, Any]:
    site = inspected.site
    return {
        "site": str(site),
        "layer": site.layer,
        "kind": site.kind,
        "heads": site.heads,
        "kv_heads": site.kv_heads,
        "head_dim": site.head_dim,
        "value_dim": site.value_dim,
        "map": list(inspected.map_shape),
        "fused": site.fused,
        "mask": site.mask,
        "bias": site.bias,
        "group": inspected.group,
        "layout": dataclasses.asdict(inspected.layout),
    }
