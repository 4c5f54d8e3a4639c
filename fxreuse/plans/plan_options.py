"""The options of a reuse plan: how each value is written, read and checked."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping

import torch

from ..errors import PlanError
from .groups import Groups
from .groups_text import parse_groups

LOWERINGS = ("auto", "materialize", "recompute")
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Match:
    """``ffn=match``: as wide as brings the parameters back to the original's; ``ffn=match:2by6``: to those of a plan.

    The plan is given by its groups; it is laid over the same stack, and widens nothing.

    >>> print(Match(), Match(parse_groups("2by6")))
    match match:2by6
    """

    groups: Groups | None = None

    def __str__(self) -> str:
        return "match" if self.groups is None else f"match:{self.groups}"


def read_number(name: str, text: str) -> int:
    """A whole number.

    Raises:
        PlanError: it is none.

    >>> read_number("values", "2")
    2
    """
    # As many digits as Python converts between int and str: whatever can be printed can be read.
    if not re.fullmatch("-?[0-9]{1,4300}", text):
        raise PlanError(f"{name}= takes a whole number, found {text!r}")
    return int(text)


def read_ffn(name: str, text: str) -> int | Match:
    """A width, or what to match.

    Raises:
        PlanError: neither.

    >>> read_ffn("ffn", "864"), read_ffn("ffn", "match")
    (864, Match(groups=None))
    """
    word, colon, groups = text.partition(":")
    if word == "match":
        return Match(parse_groups(groups) if colon else None)
    if re.fullmatch("-?[0-9]{1,4300}", text):
        return int(text)
    hint = "" if text in ("", "-") else did_you_mean(word, ["match"])
    raise PlanError(f"{name}= takes a width, match or match:PLAN, as in {name}=match:2x6, found {text!r}{hint}")


def _as_it_is(_: str, text: str) -> str:
    return text


READERS: Mapping[str, Callable[[str, str], object]] = {
    "stack": _as_it_is,
    "values": read_number,
    "ffn": read_ffn,
    "lowering": _as_it_is,
    "dtype": _as_it_is,
}
OPTIONS = (
    "stack=NAME",
    "values=2",
    "ffn=864|match|match:PLAN",
    f"lowering={'|'.join(LOWERINGS)}",
    f"dtype={'|'.join(DTYPES)}",
)


def check_stack(stack: str | None) -> None:
    """A name is one word.

    Raises:
        PlanError: it is not.
    """
    if stack is not None and not re.fullmatch(r"[^\s|]+", stack):
        raise PlanError(f"stack= takes the name of a stack, without spaces and '|', found {stack!r}")


def check_lowering(lowering: str, dtype: str | None) -> None:
    """Both are among what there is, and only a map that is stored has a dtype of its own.

    Raises:
        PlanError: they are not.
    """
    _check_known("lowering", lowering, LOWERINGS)
    if dtype is not None:
        _check_known("dtype", dtype, DTYPES)
        if lowering == "recompute":
            raise PlanError(
                "dtype= is that of a stored map, and lowering=recompute stores none; leave one of the two out"
            )


def check_count(name: str, value: object, meaning: str) -> None:
    """A number of something is 1 or more.

    Raises:
        PlanError: it is not.
    """
    if not isinstance(value, int) or value < 1:
        raise PlanError(f"{name}= is {meaning}, 1 or more, found {value!r}")


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """The nearest of what is known, as an appendix to a message; empty where nothing is near.

    >>> did_you_mean("recomput", LOWERINGS)
    ' (did you mean recompute?)'
    """
    near = difflib.get_close_matches(text.lower(), list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _check_known(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise PlanError(f"{name}= takes one of {', '.join(known)}, found {value!r}{did_you_mean(value, known)}")
