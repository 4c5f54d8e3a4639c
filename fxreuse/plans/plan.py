"""Plans: what to rewrite, as a string that people write and a value that passes read.

::

    plan := pass { "|" pass }
    pass := reuse | share | residual | fiak
    reuse := [ "reuse" ] groups { option }

The forms of groups and the options are in `FORMS` and `OPTIONS`, and every error lists them. Passes that share weights
are in `plan_weights`, that of priors is in `plan_fiak`. See docs/plans.md.
`Plan.parse(str(plan)) == plan` holds for every plan.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import PlanError
from .groups import Groups
from .groups_text import FORMS, parse_groups
from .plan_fiak import NAME as FIAK
from .plan_fiak import Fiak, read_fiak
from .plan_options import (
    LOWERINGS,
    OPTIONS,
    READERS,
    Match,
    check_count,
    check_lowering,
    check_stack,
    did_you_mean,
)
from .plan_weights import PASSES, Residual, Share, read_weight_pass


@dataclasses.dataclass(frozen=True)
class Reuse:
    """One reuse pass: groups of layers that share an attention map, laid over one stack.

    Args:
        groups: how the layers are grouped, and how many heads they have.
        stack: the stack, by its name or a unique part of it; None for the only one that the groups fit.
        lowering: how followers get the map: ``auto`` (the cost model chooses), ``materialize`` (the map is kept) or
            ``recompute`` (the leader's Q and K are kept).
        values: how many times as wide the values of followers become.
        ffn: the new width of the stack's feed-forward layers, or the size that they are to bring the model to; None
            leaves them as they are.
        dtype: the dtype in which a map is stored; None for that in which it is computed.

    Raises:
        PlanError: an option has a value that it cannot have.

    >>> reuse = Reuse(parse_groups("2x*"), stack="encoder", values=2, ffn=Match())
    >>> print(reuse)
    2x* stack=encoder values=2 ffn=match
    """

    groups: Groups
    stack: str | None = None
    lowering: str = "auto"
    values: int = 1
    ffn: int | Match | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        check_stack(self.stack)
        check_lowering(self.lowering, self.dtype)
        check_count("values", self.values, "how many times as wide the values of followers become")
        if self.ffn is not None and not isinstance(self.ffn, Match):
            check_count("ffn", self.ffn, "the width of the feed-forward layers")

    def __str__(self) -> str:
        options = {"stack": self.stack, "values": self.values, "ffn": self.ffn, "lowering": self.lowering}
        usual = {"values": 1, "lowering": "auto"}
        given = {name: value for name, value in (options | {"dtype": self.dtype}).items() if value is not None}
        words = [f"{name}={value}" for name, value in given.items() if usual.get(name) != value]
        return " ".join([str(self.groups), *words])


#: A pass of a plan.
Pass = Reuse | Share | Residual | Fiak


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do to a model: one or more passes, in order.

    >>> plan = Plan.parse("4(H8)x4 stack=encoder values=2 | 2x* stack=decoder lowering=recompute")
    >>> [str(step.groups) for step in plan.passes]
    ['4(H8)x4', '2x*']
    >>> Plan.parse(str(plan)) == plan
    True
    """

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        if not self.passes:
            raise PlanError("a plan has at least one pass, found none; " + _known())

    def __str__(self) -> str:
        return " | ".join(map(str, self.passes))

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read a plan.

        Raises:
            PlanError: it is no text, or the text is not a plan; the message names the term and where it stands.

        >>> Plan.parse("2by6 values=2").passes[0].groups
        Uniform(size=2, count=6, sign='by', heads=None)
        """
        if not isinstance(text, str):
            raise PlanError(f"a plan is read from a string such as '4x4', found {type(text).__name__}; {_known()}")
        terms = [_Term(match[0], match.start() + 1, text) for match in re.finditer(r"\||[^\s|]+", text)]
        if not terms:
            raise PlanError(f"plan {text!r} is empty; {_known()}")
        return cls(tuple(map(_parse_pass, _split(terms))))

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


def _parse_pass(terms: Sequence[_Term]) -> Pass:
    head, *rest = terms
    if head.text == FIAK:
        return read_fiak([(term.text, term.error) for term in rest])
    if head.text in PASSES:
        return read_weight_pass(head.text, head.error, [(term.text, term.error) for term in rest])
    return _parse_reuse(terms)


def _parse_reuse(terms: Sequence[_Term]) -> Reuse:
    head, *rest = terms
    if head.text == "reuse":
        if not rest:
            raise head.error("groups are missing after it, such as " + ", ".join(FORMS))
        head, *rest = rest
    for term in terms:
        if term.text == "+":
            raise term.error("groups are written without spaces, as in 4(H8)+4(H4)")
    reuse = Reuse(_parse_head(head))
    options: dict[str, Any] = {}
    for term in rest:
        name, value = _parse_option(term)
        if name in options:
            raise term.error(f"{name}= is given twice")
        try:
            options[name] = READERS[name](name, value)
            reuse = Reuse(reuse.groups, **options)
        except PlanError as error:
            raise term.error(error) from None
    return reuse


def _parse_head(term: _Term) -> Groups:
    if term.text.partition("=")[0] in READERS:
        raise term.error("groups come before options, as in '4x4 stack=NAME'")
    if term.text in ("reuse", FIAK, *PASSES):
        raise term.error("the pass is named twice; passes are separated by '|'")
    if near := difflib.get_close_matches(term.text.lower(), ["reuse", FIAK, *PASSES], n=1, cutoff=0.7):
        raise term.error(f"unknown pass (did you mean {near[0]}?)")
    try:
        return parse_groups(term.text)
    except PlanError as error:
        raise term.error(error) from None


def _parse_option(term: _Term) -> tuple[str, str]:
    name, equals, value = term.text.partition("=")
    if name in READERS and equals:
        return name, value
    if _is_groups(term.text):
        raise term.error("a pass has groups once; passes are separated by '|'")
    if term.text in LOWERINGS:
        raise term.error(f"an option is written name=value (did you mean lowering={term.text}?)")
    raise term.error(f"unknown option{did_you_mean(name, READERS)}; options are {', '.join(OPTIONS)}")


def _is_groups(text: str) -> bool:
    try:
        parse_groups(text)
    except PlanError:
        return False
    return True


def _known() -> str:
    return f"write groups, such as {', '.join(FORMS)}, then options: {', '.join(OPTIONS)}"
