"""Reading the groups of a plan from their written forms, and guessing what a near miss was meant to be."""

from __future__ import annotations

import re

from .errors import PlanError
from .groups import Groups, Leaders, Open, Pattern, Sizes, Uniform

# As many digits as Python converts between int and str: whatever can be printed can be read.
_NUMBER = r"(-?[0-9]{1,4300})"

FORMS: tuple[str, ...] = tuple(kind.form for kind in (Uniform, Open, Sizes, Pattern, Leaders))


def parse_groups(text: str) -> Groups:
    """Read groups in any of their written forms.

    Raises:
        PlanError: no form is written like this, or the numbers in it cannot be.

    >>> parse_groups("4+4+8")
    Sizes(sizes=(4, 4, 8))
    """
    groups = _read(text)
    if groups is not None:
        return groups
    repaired = _repair(text)
    hint = f" (did you mean {repaired}?)" if repaired else ""
    raise PlanError(f"neither a pass nor groups{hint}; the pass is reuse, groups are such as {', '.join(FORMS)}")


def _read(text: str) -> Groups | None:
    """The groups, or None where the text has none of the forms."""
    if match := re.fullmatch(f"{_NUMBER}(x|by){_NUMBER}", text):
        return Uniform(int(match[1]), int(match[3]), match[2])
    if match := re.fullmatch(rf"{_NUMBER}x\*", text):
        return Open(int(match[1]))
    if re.fullmatch(rf"{_NUMBER}(\+{_NUMBER})+", text):
        return Sizes(tuple(map(int, text.split("+"))))
    if re.fullmatch("[FS]+", text):
        return Pattern(text)
    name, _, value = text.partition("=")
    if name != "leaders":
        return None
    if not re.fullmatch(f"{_NUMBER}(,{_NUMBER})*", value):
        raise PlanError(f"leaders= takes indices and commas, no spaces, as in leaders=0,0,2,2, found {value!r}")
    return Leaders(tuple(map(int, value.split(","))))


def _repair(text: str) -> str | None:
    """What a near miss was probably meant to be: the first of the usual slips that, once undone, can be read."""
    for slip, meant in (
        (r"[X×*-]", "x"),
        (r"(?i)by", "x"),
        (r"([nN…]|\.\.\.)$", "*"),
        (r"[-,]", "+"),
        (r"^(leader|layers)?=?(?=[0-9]+,)", "leaders="),
        (r"^([0-9]+)x?$", r"\1x*"),
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
