"""Reading the groups of a plan from their written forms, and guessing what a near miss was meant to be."""

from __future__ import annotations

import re

from ..errors import PlanError
from .groups import Groups, Leaders, Open, Pattern, Run, Sizes, Uniform

# As many digits as Python converts between int and str: whatever can be printed can be read.
_NUMBER = r"(-?[0-9]{1,4300})"
_HEADS = rf"(?:\(H{_NUMBER}\))?"
_RUN = f"{_NUMBER}{_HEADS}(?:x{_NUMBER})?"

FORMS: tuple[str, ...] = tuple(kind.form for kind in (Uniform, Open, Sizes, Pattern, Leaders))


def parse_groups(text: str) -> Groups:
    """Read groups in any of their written forms.

    Raises:
        PlanError: no form is written like this, or the numbers in it cannot be.

    >>> parse_groups("4(H8)x2+8")
    Sizes(runs=(Run(size=4, count=2, heads=8), Run(size=8, count=1, heads=None)))
    """
    groups = _read(text)
    if groups is not None:
        return groups
    repaired = _repair(text)
    hint = f" (did you mean {repaired}?)" if repaired else ""
    raise PlanError(
        f"neither a pass nor groups{hint}; passes are reuse, share and residual, groups are such as {', '.join(FORMS)}"
    )


def _read(text: str) -> Groups | None:
    """The groups, or None where the text has none of the forms."""
    if match := re.fullmatch(f"{_NUMBER}{_HEADS}(x|by){_NUMBER}", text):
        return Uniform(int(match[1]), int(match[4]), match[3], _number(match[2]))
    if match := re.fullmatch(rf"{_NUMBER}{_HEADS}x\*", text):
        return Open(int(match[1]), _number(match[2]))
    runs = [re.fullmatch(_RUN, part) for part in text.split("+")]
    if len(runs) > 1 and all(runs):
        return Sizes(tuple(Run(int(run[1]), int(run[3] or 1), _number(run[2])) for run in runs if run))
    if re.fullmatch("[FS]+", text):
        return Pattern(text)
    name, _, value = text.partition("=")
    if name != "leaders":
        return None
    if not re.fullmatch(f"{_NUMBER}(,{_NUMBER})*", value):
        raise PlanError(f"leaders= takes indices and commas, no spaces, as in leaders=0,0,2,2, found {value!r}")
    return Leaders(tuple(map(int, value.split(","))))


def _number(digits: str | None) -> int | None:
    return None if digits is None else int(digits)


def _repair(text: str) -> str | None:
    """What a near miss was probably meant to be: the first of the usual slips that, once undone, can be read."""
    for slip, meant in (
        (r"[X×*-]", "x"),
        (r"(?i)by", "x"),
        (r"[(\[]?[Hh]?(?<=[(\[Hh])([0-9]+)[)\]]?", r"(H\1)"),
        (r"([nN…]|\.\.\.)$", "*"),
        (r"[-,]", "+"),
        (r"^(leader|layers)?=?(?=[0-9]+,)", "leaders="),
        (r"^([0-9]+(\(H[0-9]+\))?)x?$", r"\1x*"),
    ):
        candidate = re.sub(slip, meant, text)
        if candidate != text and _readable(candidate):
            return candidate
    return text.upper() if _readable(text.upper()) else None


def _readable(text: str) -> bool:
    try:
        return _read(text) is not None
    except PlanError:
        return False
