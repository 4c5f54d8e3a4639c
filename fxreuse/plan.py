"""Plans: what to rewrite, as a string that people write and a value that passes read.

::

    plan  := pass { "|" pass }
    reuse := [ "reuse" ] groups { option }

The forms of groups and the options are in `FORMS` and `OPTIONS`, and every error lists them.
`Plan.parse(str(plan)) == plan` holds for every plan.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .errors import PlanError
from .groups import Groups, count_layers, describe_fitting, fitting
from .groups_text import FORMS, parse_groups

LOWERINGS = ("auto", "materialize", "recompute")
OPTIONS = ("stack=NAME", "lowering=" + "|".join(LOWERINGS))
_OPTION_NAMES = tuple(option.partition("=")[0] for option in OPTIONS)


@dataclasses.dataclass(frozen=True)
class Reuse:
    """One reuse pass: groups of layers that share an attention map, laid over one stack.

    Args:
        groups: how the layers are grouped.
        stack: the stack, by its name or a unique part of it; None for the only one that the groups fit.
        lowering: how followers get the map: ``auto`` (the cost model chooses), ``materialize`` (the map is kept) or
            ``recompute`` (the leader's Q and K are kept).

    Raises:
        PlanError: an option has a value that it cannot have.

    >>> reuse = Reuse(parse_groups("2x*"), stack="encoder")
    >>> print(reuse)
    2x* stack=encoder
    """

    groups: Groups
    stack: str | None = None
    lowering: str = "auto"

    def __post_init__(self) -> None:
        if self.stack is not None and not re.fullmatch(r"[^\s|]+", self.stack):
            raise PlanError(f"stack= takes the name of a stack, without spaces and '|', found {self.stack!r}")
        if self.lowering not in LOWERINGS:
            hint = _did_you_mean(self.lowering, LOWERINGS)
            raise PlanError(f"lowering= takes one of {', '.join(LOWERINGS)}, found {self.lowering!r}{hint}")

    def __str__(self) -> str:
        stack = "" if self.stack is None else f" stack={self.stack}"
        lowering = "" if self.lowering == "auto" else f" lowering={self.lowering}"
        return f"{self.groups}{stack}{lowering}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do to a model: one or more passes, in order.

    >>> plan = Plan.parse("4x4 stack=encoder | 2x* stack=decoder lowering=recompute")
    >>> [str(step.groups) for step in plan.passes]
    ['4x4', '2x*']
    >>> Plan.parse(str(plan)) == plan
    True
    """

    passes: tuple[Reuse, ...]

    def __post_init__(self) -> None:
        if not self.passes:
            raise PlanError("a plan has at least one pass, found none; " + _known())

    def __str__(self) -> str:
        return " | ".join(map(str, self.passes))

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read a plan.

        Raises:
            PlanError: the text is not a plan; the message names the term and where it stands.

        >>> Plan.parse("2by6")
        Plan(passes=(Reuse(groups=Uniform(size=2, count=6, sign='by'), stack=None, lowering='auto'),))
        """
        terms = [_Term(match[0], match.start() + 1, text) for match in re.finditer(r"\||[^\s|]+", text)]
        if not terms:
            raise PlanError(f"plan {text!r} is empty; {_known()}")
        return cls(tuple(_parse_reuse(step) for step in _split(terms)))

    @classmethod
    def of(cls, plan: str | Plan) -> Plan:
        """The plan itself, or the one that the string spells.

        >>> Plan.of(Plan.of("4x4")) == Plan.of("reuse 4x4")
        True
        """
        if isinstance(plan, Plan):
            return plan
        if isinstance(plan, str):
            return cls.parse(plan)
        raise PlanError(f"a plan is a string such as '4x4' or a fxreuse.Plan, found {type(plan).__name__}")


def choose_stack(reuse: Reuse, stacks: Mapping[str, int]) -> tuple[str, tuple[int, ...]]:
    """The stack that a reuse pass is laid over, and the leader of each of its layers.

    Args:
        reuse: the pass. Its ``stack`` may be a name or whatever part of a name only one stack has: how it begins,
            some of its dotted components, or any piece of it, in this order.
        stacks: the number of layers of every stack.

    Raises:
        PlanError: no such stack, none or several that fit, or another number of layers.

    >>> choose_stack(Plan.parse("2x*").passes[0], {"encoder.layer.{i}·self": 3})
    ('encoder.layer.{i}·self', (0, 0, 2))
    """
    if not stacks:
        raise PlanError(f"plan {str(reuse)!r}: the model has no stack of attentions to lay it over")
    name = _fitting_stack(reuse, stacks) if reuse.stack is None else _named_stack(reuse, reuse.stack, stacks)
    layers = stacks[name]
    if not reuse.groups.fits(layers):
        raise PlanError(
            f"plan {str(reuse)!r} is for {reuse.groups.extent}, found {count_layers(layers)} in stack {name}; "
            + describe_fitting(layers)
        )
    return name, reuse.groups.leaders(layers)


class _Term(NamedTuple):
    """A word of a plan and where it stands, counted from 1."""

    text: str
    position: int
    plan: str

    def error(self, reason: object) -> PlanError:
        return PlanError(f"plan {self.plan!r}, {self.text!r} at character {self.position}: {reason}")


def _split(terms: Sequence[_Term]) -> list[list[_Term]]:
    """The terms of each pass; none of them is empty."""
    steps: list[list[_Term]] = [[]]
    for term in terms:
        if term.text != "|":
            steps[-1].append(term)
        elif not steps[-1]:
            raise term.error("a pass is missing before it")
        else:
            steps.append([])
    if not steps[-1]:
        raise terms[-1].error("a pass is missing after it")
    return steps


def _parse_reuse(terms: Sequence[_Term]) -> Reuse:
    head, *rest = terms
    if head.text == "reuse":
        if not rest:
            raise head.error("groups are missing after it, such as " + ", ".join(FORMS))
        head, *rest = rest
    reuse = Reuse(_parse_head(head))
    options: dict[str, str] = {}
    for term in rest:
        name, value = _parse_option(term)
        if name in options:
            raise term.error(f"{name}= is given twice")
        options[name] = value
        try:
            reuse = Reuse(reuse.groups, **options)
        except PlanError as error:
            raise term.error(error) from None
    return reuse


def _parse_head(term: _Term) -> Groups:
    if term.text.partition("=")[0] in _OPTION_NAMES:
        raise term.error("groups come before options, as in '4x4 stack=NAME'")
    if term.text == "reuse":
        raise term.error("the pass is named twice; passes are separated by '|'")
    if difflib.get_close_matches(term.text.lower(), ["reuse"], cutoff=0.7):
        raise term.error("unknown pass (did you mean reuse?)")
    try:
        return parse_groups(term.text)
    except PlanError as error:
        raise term.error(error) from None


def _parse_option(term: _Term) -> tuple[str, str]:
    name, equals, value = term.text.partition("=")
    if name in _OPTION_NAMES and equals:
        return name, value
    if _is_groups(term.text):
        raise term.error("a pass has groups once; passes are separated by '|'")
    if term.text in LOWERINGS:
        raise term.error(f"an option is written name=value (did you mean lowering={term.text}?)")
    raise term.error(f"unknown option{_did_you_mean(name, _OPTION_NAMES)}; options are {', '.join(OPTIONS)}")


def _is_groups(text: str) -> bool:
    try:
        parse_groups(text)
    except PlanError:
        return False
    return True


def _named_stack(reuse: Reuse, wanted: str, stacks: Mapping[str, int]) -> str:
    """The one stack that a name means."""
    if wanted in stacks:
        return wanted
    prefixed = [name for name in stacks if name.startswith(wanted)]
    component = [name for name in stacks if f".{wanted}." in f".{name}.".replace("·", ".")]
    containing = [name for name in stacks if wanted in name]
    for matches in (prefixed, component, containing):
        if len(matches) == 1:
            return matches[0]
    if containing:
        raise PlanError(
            f"plan {str(reuse)!r}: stack={wanted} may mean any of these stacks; give more of the name, as in "
            f"{_with_stack(reuse, containing[0])!r}\n" + _table({name: stacks[name] for name in containing})
        )
    pieces = {piece: name for name in stacks for piece in (name, *re.split(r"[.·]", name))}
    near = difflib.get_close_matches(wanted, pieces, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise PlanError(f"plan {str(reuse)!r}: no stack is called {wanted}{hint}; the stacks are\n" + _table(stacks))


def _fitting_stack(reuse: Reuse, stacks: Mapping[str, int]) -> str:
    """The only stack that the groups fit, or the only one there is."""
    fits = [name for name, layers in stacks.items() if reuse.groups.fits(layers)]
    if len(stacks) == 1:
        return next(iter(stacks))
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise PlanError(
            f"plan {str(reuse)!r} fits {len(fits)} stacks; say which, as in {_with_stack(reuse, fits[0])!r}; they are\n"
            + _table({name: stacks[name] for name in fits})
        )
    raise PlanError(
        f"plan {str(reuse)!r} is for {reuse.groups.extent}; no stack has as many; the stacks are\n" + _table(stacks)
    )


def _with_stack(reuse: Reuse, name: str) -> str:
    return str(dataclasses.replace(reuse, stack=name))


def _table(stacks: Mapping[str, int]) -> str:
    """A line for each stack: its name, its layers, and plans that fit."""
    rows = [f"  {name}: {count_layers(layers)}, takes {', '.join(fitting(layers))}" for name, layers in stacks.items()]
    return "\n".join(rows)


def _did_you_mean(text: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(text.lower(), list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _known() -> str:
    return f"write groups, such as {', '.join(FORMS)}, then options: {', '.join(OPTIONS)}"
