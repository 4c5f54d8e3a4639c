"""The passes of a plan that share weights between layers: `share`, and `residual` on top of it (ResidualTransformer).

::

    share    := "share" groups { stack=NAME  bias=shared|own  init=first|mean  convolutions=yes|no }
    residual := "residual" [ groups ] r=16 { stack=NAME  diagonal=yes|no  bias=shared|own  init=fit|zero
                lowering=auto|factored|merged  convolutions=yes|no }

Groups are ``k=3`` (three layers a group to the end of the stack) or any form of `groups` without heads, such as
``3+3+2``. Terms may stand in any order.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import PlanError
from .groups import Groups, Open
from .groups_text import parse_groups
from .plan_options import check_count, check_stack, did_you_mean, read_number

BIASES = ("shared", "own")
STARTS = ("first", "mean")
FITS = ("fit", "zero")
LOWERINGS = ("auto", "factored", "merged")
_YES_NO = {"yes": True, "no": False}


@dataclasses.dataclass(frozen=True)
class Share:
    """One share pass: the layers of a group have one weight for each of their projections.

    Args:
        groups: how the layers are grouped.
        stack: the stack, by its name or a unique part of it; None for the only one that the groups fit.
        bias: ``shared`` with the weight, or each layer's ``own``.
        init: what a group starts from: the weights of its ``first`` layer, or the ``mean`` of its layers'.
        convolutions: whether convolutions over one position, which are projections of each, take part.

    Raises:
        PlanError: an option has a value that it cannot have.

    >>> print(Share(Open(3), bias="own"))
    share k=3 bias=own
    """

    groups: Groups
    stack: str | None = None
    bias: str = "shared"
    init: str = "first"
    convolutions: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.groups, Groups):
            raise PlanError("share takes groups of layers, such as k=3 or 3+3+2")
        _check_groups(self.groups)
        check_stack(self.stack)
        _check_word("bias", self.bias, BIASES)
        _check_word("init", self.init, STARTS)

    def __str__(self) -> str:
        options = {"stack": self.stack, "bias": self.bias, "init": self.init}
        options["convolutions"] = _written_yes_no(self.convolutions)
        return _written("share", self.groups, options, {"bias": "shared", "init": "first", "convolutions": "no"})


@dataclasses.dataclass(frozen=True)
class Residual:
    """One residual pass: each layer adds a product of low rank and a diagonal of its own to a shared weight.

    Args:
        rank: the rank of the product.
        groups: how the layers are grouped; None for a model, or a plan, whose layers share their weights already.
        stack: the stack, by its name or a unique part of it; None for the only one that the groups fit.
        diagonal: whether there is a diagonal, too.
        bias: ``shared`` with the weight, or each layer's ``own``.
        init: ``fit`` to the weights that there are, or ``zero``: what the shared weights alone compute.
        lowering: how it is computed: ``auto`` (the cheaper one), ``factored`` (products of the input with each part)
            or ``merged`` (the weight is put together first).
        convolutions: whether convolutions over one position, which are projections of each, take part.

    Raises:
        PlanError: an option has a value that it cannot have.

    >>> print(Residual(16, Open(3), diagonal=False, init="zero"))
    residual k=3 r=16 diagonal=no init=zero
    """

    rank: int
    groups: Groups | None = None
    stack: str | None = None
    diagonal: bool = True
    bias: str = "shared"
    init: str = "fit"
    lowering: str = "auto"
    convolutions: bool = False

    def __post_init__(self) -> None:
        check_count("r", self.rank, "the rank of a residual")
        if self.groups is not None:
            _check_groups(self.groups)
        elif self.bias != "shared":
            raise PlanError("bias= is said where weights are shared; give groups such as k=3, or leave bias= out")
        check_stack(self.stack)
        _check_word("bias", self.bias, BIASES)
        _check_word("init", self.init, FITS)
        _check_word("lowering", self.lowering, LOWERINGS)

    def __str__(self) -> str:
        options = {"r": self.rank, "stack": self.stack, "diagonal": _written_yes_no(self.diagonal)}
        options |= {"bias": self.bias, "init": self.init, "lowering": self.lowering}
        options["convolutions"] = _written_yes_no(self.convolutions)
        usual = {"diagonal": "yes", "bias": "shared", "init": "fit", "lowering": "auto", "convolutions": "no"}
        return _written("residual", self.groups, options, usual)


#: A term of a plan, and how an error about it begins.
Term = tuple[str, Callable[[object], PlanError]]


def read_size(name: str, text: str) -> Groups:
    """The groups of ``k=3``.

    >>> read_size("k", "3")
    Open(size=3, heads=None)
    """
    size = read_number(name, text)
    check_count(name, size, "the number of layers that share a weight")
    return Open(size)


def _read_rank(name: str, text: str) -> int:
    rank = read_number(name, text)
    check_count(name, rank, "the rank of a residual")
    return rank


def _read_stack(_: str, text: str) -> str:
    check_stack(text)
    return text


def _reader_of(words: Sequence[str]) -> Callable[[str, str], str]:
    def read(name: str, text: str) -> str:
        _check_word(name, text, words)
        return text

    return read


def _read_yes_no(name: str, text: str) -> bool:
    _check_word(name, text, tuple(_YES_NO))
    return _YES_NO[text]


# pass → option → (field, reader)
_Readers = Mapping[str, tuple[str, Callable[[str, str], object]]]
_SHARE: _Readers = {
    "k": ("groups", read_size),
    "stack": ("stack", _read_stack),
    "bias": ("bias", _reader_of(BIASES)),
    "init": ("init", _reader_of(STARTS)),
    "convolutions": ("convolutions", _read_yes_no),
}
_RESIDUAL: _Readers = {
    "k": ("groups", read_size),
    "r": ("rank", _read_rank),
    "stack": ("stack", _read_stack),
    "diagonal": ("diagonal", _read_yes_no),
    "bias": ("bias", _reader_of(BIASES)),
    "init": ("init", _reader_of(FITS)),
    "lowering": ("lowering", _reader_of(LOWERINGS)),
    "convolutions": ("convolutions", _read_yes_no),
}
_KNOWN = {
    "share": "k=3 or groups such as 3+3+2, stack=NAME, bias=shared|own, init=first|mean, convolutions=yes|no",
    "residual": "k=3 or groups such as 3+3+2, r=16, stack=NAME, diagonal=yes|no, bias=shared|own, init=fit|zero, "
    "lowering=auto|factored|merged, convolutions=yes|no",
}
#: The words that these passes begin with.
PASSES = tuple(_KNOWN)


def read_weight_pass(word: str, head: Callable[[object], PlanError], terms: Sequence[Term]) -> Share | Residual:
    """A pass from its terms.

    Arguments:
        word: ``share`` or ``residual``.
        head: makes the error about the pass as a whole.
        terms: what follows the word.

    Raises:
        PlanError: a term is not known or given twice, or one is missing.
    """
    readers = _SHARE if word == "share" else _RESIDUAL
    given: dict[str, Any] = {}
    for text, error in terms:
        name, equals, value = text.partition("=")
        try:
            if equals and name in readers:
                field, reader = readers[name]
                found = reader(name, value)
            else:
                field, found = "groups", _read_groups(word, text, readers)
        except PlanError as reason:
            raise error(reason) from None
        if field in given:
            raise error("a pass has groups once" if field == "groups" else f"{name}= is given twice")
        given[field] = found
    missing = "groups" if word == "share" else "rank"
    if missing not in given:
        what = "groups are missing after it" if word == "share" else "r= is missing after it"
        raise head(f"{what}; {word} takes {_KNOWN[word]}")
    try:
        return Share(**given) if word == "share" else Residual(**given)
    except PlanError as reason:
        raise head(reason) from None


def _read_groups(word: str, text: str, readers: _Readers) -> Groups:
    name = text.partition("=")[0]
    if text[:1].isdigit() or set(text) <= {"F", "S"} or name == "leaders":
        groups = parse_groups(text)
        _check_groups(groups)
        return groups
    if difflib.get_close_matches(text.lower(), PASSES, cutoff=0.7):
        raise PlanError("passes are separated by '|'")
    raise PlanError(f"unknown option{did_you_mean(name, readers)}; {word} takes {_KNOWN[word]}")


def _check_groups(groups: Groups) -> None:
    """Groups of weights have no heads of their own."""
    heads = next((count for count in groups.head_counts(groups.layers or 2) if count is not None), None)
    if heads is not None:
        raise PlanError(f"heads (H{heads}) belong to a reuse pass; groups of shared weights are such as k=3 or 3+3+2")


def _check_word(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise PlanError(f"{name}= takes one of {', '.join(known)}, found {value!r}{did_you_mean(str(value), known)}")


def _written_yes_no(value: bool) -> str:
    return "yes" if value else "no"


def _written(word: str, groups: Groups | None, options: Mapping[str, object], usual: Mapping[str, object]) -> str:
    size = f"k={groups.size}" if isinstance(groups, Open) else groups
    given = [f"{name}={value}" for name, value in options.items() if value is not None and usual.get(name) != value]
    return " ".join([word, *([] if size is None else [str(size)]), *given])
