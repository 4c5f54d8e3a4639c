"""The ``fiak`` pass of a plan: priors on the keys of every self-attention of a stack, and what they are to prune."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction

from ..errors import PlanError
from .plan_options import check_count, check_stack, did_you_mean, read_number

NAME = "fiak"
PRIORS = ("admixture", "mixture")
LOWERINGS = ("auto", "mask", "flex", "gather")
OPTIONS = (
    "scores=0.7",
    "keys=0.2",
    f"prior={'|'.join(PRIORS)}",
    "per_head=yes|no",
    "block=128",
    f"lowering={'|'.join(LOWERINGS)}",
    "stack=NAME",
)


@dataclasses.dataclass(frozen=True)
class Fiak:
    """One fiak pass (Nguyen et al., "A Probabilistic Framework for Pruning Transformers", Definition 1).

    Args:
        scores: the fraction of the attention scores that `fxreuse.prune` is to cut where it is given none itself.
        keys: the fraction of the keys, likewise.
        prior: ``admixture``, one number π_ij for every query and key, or ``mixture``, one π_j for every key.
        per_head: whether every head has priors of its own.
        block: the side of the square blocks that scores are cut by; 1 for single scores.
        lowering: how cut scores are left out: ``auto`` (the cheapest), ``mask``, ``flex`` or ``gather``.
        stack: the stack, by its name or a unique part of it; None for the only one of self-attention.

    Raises:
        PlanError: an option has a value that it cannot have.

    >>> print(Fiak(scores=0.7, keys=0.2, per_head=True))
    fiak scores=0.7 keys=0.2 per_head=yes
    """

    scores: float = 0.0
    keys: float = 0.0
    prior: str = "admixture"
    per_head: bool = False
    block: int = 1
    lowering: str = "auto"
    stack: str | None = None

    def __post_init__(self) -> None:
        check_fractions(self.scores, self.keys)
        if self.prior not in PRIORS:
            raise PlanError(f"prior= takes one of {', '.join(PRIORS)}, found {self.prior!r}")
        if not isinstance(self.per_head, bool):
            raise PlanError(f"per_head= is yes or no, found {self.per_head!r}")
        check_count("block", self.block, "the side of the blocks that scores are cut by")
        check_fiak_lowering(self.lowering, self.block)
        check_stack(self.stack)
        if self.prior == "mixture":
            check_mixture(self.scores)
            if self.block != 1:
                raise PlanError("block= is about scores, which prior=mixture does not rank; use prior=admixture")

    def __str__(self) -> str:
        words = [NAME]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                words.append(f"{field.name}={_written(value)}")
        return " ".join(words)


def _written(value: object) -> str:
    """A value as `read_fiak` reads it: a fraction without an exponent."""
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f")
    return "yes" if value is True else str(value)


def check_fractions(scores: float, keys: float) -> None:
    """Both are fractions, and cutting keys alone cuts no larger part of the scores than is asked for.

    Raises:
        PlanError: they are not.

    >>> check_fractions(1.0, 0.0)
    Traceback (most recent call last):
    fxreuse.errors.PlanError: scores= is the fraction to prune, at least 0 and below 1, found 1.0
    """
    for name, value in (("scores", scores), ("keys", keys)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise PlanError(f"{name}= is the fraction to prune, at least 0 and below 1, found {value!r}")
    if 0 < scores < keys:
        raise PlanError(
            f"scores={scores} is below keys={keys}, but a key that is pruned takes its scores with it: scores= counts "
            "those, too; give scores= at least keys=, or leave it out"
        )


def check_mixture(scores: float) -> None:
    """A mixture ranks keys alone.

    Raises:
        PlanError: scores are to be cut by it.
    """
    if scores:
        raise PlanError(
            f"scores={scores} needs a prior for every query and key, and prior=mixture has one for every key; "
            "use keys=, or prior=admixture"
        )


def check_fiak_lowering(lowering: str, block: int) -> None:
    """The lowering is one that there is, and what skips blocks has blocks.

    Raises:
        PlanError: it is not.
    """
    if lowering not in LOWERINGS:
        hint = did_you_mean(str(lowering), LOWERINGS)
        raise PlanError(f"lowering= takes one of {', '.join(LOWERINGS)}, found {lowering!r}{hint}")
    if lowering in ("flex", "gather") and block == 1:
        raise PlanError(f"lowering={lowering} skips whole blocks of scores; say how large they are, as in block=128")


def fraction(value: float) -> Fraction:
    """A fraction as it is written: 0.7 is seven tenths, and not the nearest double.

    >>> fraction(0.7)
    Fraction(7, 10)
    """
    return Fraction(str(value))


def read_fiak(words: list[tuple[str, Callable[[object], PlanError]]]) -> Fiak:
    """A fiak pass from the words behind its name, each with what makes an error about it.

    Raises:
        PlanError: a word is no option; the error names it.
    """
    options: dict[str, object] = {}
    for text, error in words:
        name, equals, value = text.partition("=")
        if name not in _READERS or not equals:
            hint = did_you_mean(name, _READERS)
            raise error(f"unknown option of {NAME}{hint}; options are {', '.join(OPTIONS)}")
        if name in options:
            raise error(f"{name}= is given twice")
        try:
            options[name] = _READERS[name](name, value)
        except PlanError as reason:
            raise error(reason) from None
    try:
        return Fiak(**options)  # type: ignore[arg-type]
    except PlanError as reason:
        raise words[-1][1](reason) from None


def _read_fraction(name: str, text: str) -> float:
    if not re.fullmatch(r"-?[0-9]{0,30}\.?[0-9]{1,400}", text):
        raise PlanError(f"{name}= takes a fraction, such as 0.7, found {text!r}")
    return float(text)


def _read_switch(name: str, text: str) -> bool:
    if text not in ("yes", "no"):
        raise PlanError(f"{name}= is yes or no, found {text!r}")
    return text == "yes"


def _as_it_is(_: str, text: str) -> str:
    return text


_READERS: Mapping[str, Callable[[str, str], object]] = {
    "scores": _read_fraction,
    "keys": _read_fraction,
    "prior": _as_it_is,
    "per_head": _read_switch,
    "block": read_number,
    "lowering": _as_it_is,
    "stack": _as_it_is,
}
