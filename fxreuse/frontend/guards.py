"""Guards: what export assumed about the sizes of the inputs, as data, and as a function that checks it.

A branch on a size (``if T % 4 == 0``) leaves no trace in a graph but its guard. A graph that runs without checking it
is silently another model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..errors import CaptureError, InputError
from ..program import Guard, Leaf, fixed_size, kind_of

_UNBOUNDED = 2**31
# Functions of sizes, and of the numbers made of them (``arange`` with an end that is no integer), in torch's spelling.
_OF_SIZES = {"sym_float", "sym_int", "sym_max", "sym_min"}
_WORDS_OF_GUARDS = {"size", "min", "max", "abs", "math", "or", "and", "not", "torch"} | _OF_SIZES
_SIZE = re.compile(r"L((?:\[[^\]]*\])+)\.size\(\)\[(\d+)\]")
_SIMPLE = re.compile(r"size\(\"([^\"]*)\", (\d+)\) (==|!=|<=|>=|<|>) (-?\d+)")
_SWAPPED = re.compile(r"(-?\d+) (==|!=|<=|>=|<|>) (size\(\"[^\"]*\", \d+\))")
# What export makes of a slice of a table: ``min(64, n) == n``, in several spellings, says n <= 64.
_CAP = re.compile(r"(size\(\"[^\"]*\", \d+\)) == min\((\d+), \1\)(?: or min\(\2, \1\) == 1)?")
_MIRRORED_CAP = re.compile(r"min\((\d+), (size\(\"[^\"]*\", \d+\))\) == \2")
_MIRROR = {"==": "==", "!=": "!=", "<=": ">=", ">=": "<=", "<": ">", ">": "<"}
_WORDS = {
    "==": "must be",
    "!=": "must not be",
    "<=": "must be at most",
    ">=": "must be at least",
    "<": "must be below",
    ">": "must be above",
}


def from_export(
    sources: Iterable[str],
    leaves: Sequence[tuple[Leaf, torch.Tensor]],
    ranges: Mapping[Any, Any] | None = None,
    flat: Sequence[Any] = (),
) -> tuple[Guard, ...]:
    """The guards of an export, each once: its own conditions, fixed dimensions, and bounds of free ones.

    Arguments:
        sources: conditions in the form that `torch.export` keeps them, ``"L['x'].size()[1] % 4 == 0"``.
        leaves: the tensor inputs with the fake tensors that stand for them in the graph.
        ranges: the bounds of the symbols, as `torch.export.ExportedProgram.range_constraints` has them.
        flat: all leaves of the call in order, constants among them, by which strict export names its inputs.

    Raises:
        CaptureError: for a condition that cannot be read.
    """
    ranges = ranges or {}
    names = {leaf.name for leaf, _ in leaves}
    guards = [_convert(source, names, flat) for source in sources]
    for leaf, value in leaves:
        for dim, size in enumerate(value.shape):
            guards += _bounds(f'size("{leaf.name}", {dim})', size, ranges)
    return tuple({guard.source: guard for guard in guards}.values())


def _bounds(name: str, size: int | torch.SymInt, ranges: Mapping[Any, Any]) -> list[Guard]:
    """The guards of one dimension: that it is a fixed number, or between its bounds."""
    number = fixed_size(size)
    if number is not None:
        return [make_guard(f"{name} == {number}")]
    assert isinstance(size, torch.SymInt)
    limits = ranges.get(size.node.expr)
    if limits is None:
        return []
    guards = [make_guard(f"{name} >= {limits.lower}")] if limits.lower > 2 else []
    return [*guards, make_guard(f"{name} <= {limits.upper}")] if limits.upper < _UNBOUNDED else guards


def _convert(source: str, names: set[str], flat: Sequence[Any]) -> Guard:
    """One condition of export.

    Raises:
        CaptureError: for a condition that cannot be read. It cannot be left out: the graph may hold under it only.
    """

    def size(match: re.Match[str]) -> str:
        keys = [key.strip("'\"") for key in re.findall(r"\[([^\]]*)\]", match.group(1))]
        if keys[0] == "flat_args" and isinstance(flat[int(keys[1])], Leaf):
            return f'size("{flat[int(keys[1])].name}", {match.group(2)})'
        rest = "".join(f"[{key}]" for key in re.findall(r"\[([^\]]*)\]", match.group(1))[1:])
        return f'size("{keys[0]}{rest}", {match.group(2)})'

    converted = _SIZE.sub(size, source)
    converted = _CAP.sub(r"\1 <= \2", _MIRRORED_CAP.sub(r"\2 <= \1", converted))
    swapped = _SWAPPED.fullmatch(converted)
    if swapped:
        converted = f"{swapped.group(3)} {_MIRROR[swapped.group(2)]} {swapped.group(1)}"
    words = set(re.findall(r"[A-Za-z_]\w*", re.sub(r"\"[^\"]*\"", "", converted)))
    unknown = [name for name, _ in Guard(converted, "").sizes() if name not in names]
    if unknown or not words <= _WORDS_OF_GUARDS | set(dir(math)):
        raise CaptureError(
            f"export made the graph under a condition that cannot be checked at a call: {source}. "
            "Next: capture only the part around the attentions with target='path.of.the.encoder'."
        )
    return make_guard(converted)


def make_guard(source: str) -> Guard:
    """A guard with a sentence that says the condition.

    >>> make_guard('size("input_ids", 1) <= 64').text
    'input_ids: dimension 1 must be at most 64'
    """
    simple = _SIMPLE.fullmatch(source)
    if simple:
        name, dim, relation, bound = simple.groups()
        return Guard(source, f"{name}: dimension {dim} {_WORDS[relation]} {bound}")
    words = re.sub(r'size\("([^"]*)", (\d+)\)', r"\1.shape[\2]", source)
    return Guard(source, re.sub(r"\b(math\.|torch\.sym_)", "", words))


def allow_batch_of_one(guards: Iterable[Guard], leaf: Leaf) -> tuple[Guard, ...]:
    """The same guards, waived at a batch of 1 (dimension 0 of ``leaf``) where they forbid just that.

    Those are the conditions on batches alone, and those that exclude one value (``batch * length != length``). Any
    other condition that joins the batch with a length still has to hold at a batch of 1.
    """
    one = f'size("{leaf.name}", 0) == 1'
    return tuple(
        Guard(f"{one} or ({guard.source})", guard.text) if _forbids_a_batch(guard) else guard for guard in guards
    )


def _forbids_a_batch(guard: Guard) -> bool:
    dims = {dim for _, dim in guard.sizes()}
    return dims == {0} or (0 in dims and excludes_one_value(guard))


def excludes_one_value(guard: Guard) -> bool:
    """Whether a guard has the form ``expression != number``.

    >>> excludes_one_value(make_guard('(size("x", 1) // 10) != 22')), excludes_one_value(make_guard('size("x", 1) > 1'))
    (True, False)
    """
    return re.fullmatch(r"[^=<>!%]*!= [^=<>!%]*", guard.source) is not None


def holds(guard: Guard, sizes: Mapping[tuple[str, int], int]) -> bool:
    """Whether a guard holds at these sizes, ``(leaf, dimension)`` → size.

    >>> holds(make_guard('size("x", 0) % 4 == 0'), {("x", 0): 8})
    True
    """
    functions = {"max": max, "min": min, "math": math, "abs": abs, "torch": torch}
    scope = {"size": lambda leaf, dim: sizes[leaf, dim], **functions}
    return bool(eval(guard.source, {"__builtins__": {}}, scope))


def checker(guards: Sequence[Guard], leaves: Sequence[Leaf], name: str) -> Callable[..., None]:
    """A function of the tensor leaves that raises `InputError` where a guard does not hold.

    It is made of plain comparisons of sizes, so that `torch.compile` turns it into its own guards.
    """
    position = {leaf.name: index for index, leaf in enumerate(leaves)}
    arguments = ", ".join(f"x{index}" for index in range(len(leaves)))
    lines = [f"def check({arguments}):"]
    for index, leaf in enumerate(leaves):
        lines += [f"    if x{index}.dim() != {leaf.ndim}:", f"        raise fail_rank({index}, x{index}.dim())"]
        lines += [
            f"    if kind_of(x{index}.dtype) != {leaf.kind!r}:",
            f"        raise fail_kind({index}, x{index}.dtype)",
        ]
    for number, guard in enumerate(guards):
        condition = re.sub(
            r"size\(\"([^\"]*)\", (\d+)\)", lambda m: f"x{position[m.group(1)]}.size({m.group(2)})", guard.source
        )
        found = ", ".join(f"x{position[leaf]}.size({dim})" for leaf, dim in guard.sizes())
        lines += [f"    if not ({condition}):", f"        raise fail({number}, ({found},))"]
    if len(lines) == 1:
        lines.append("    pass")

    def fail(number: int, found: tuple[int, ...]) -> InputError:
        guard = guards[number]
        seen = ", ".join(
            f"{leaf}.shape[{dim}] = {size}" for (leaf, dim), size in zip(guard.sizes(), found, strict=True)
        )
        return InputError(
            f"{name}: {guard.text}; found {seen}. The model was captured under this condition: "
            "apply the plan again with example_inputs of such a size, or bring the input to a size that fits."
        )

    def fail_rank(index: int, found: int) -> InputError:
        leaf = leaves[index]
        return InputError(f"{name}: {leaf.name} must have {leaf.ndim} dimensions; found {found}.")

    def fail_kind(index: int, found: torch.dtype) -> InputError:
        leaf = leaves[index]
        return InputError(
            f"{name}: {leaf.name} must be {leaf.kind}, as when the model was captured; found {found}. "
            "Convert it, or apply the plan again with example_inputs of this kind."
        )

    raising = {"fail": fail, "fail_rank": fail_rank, "fail_kind": fail_kind}
    scope = {**raising, "kind_of": kind_of, "math": math, "torch": torch}
    exec("\n".join(lines), scope)
    return scope["check"]  # type: ignore[return-value]
