"""Guards: what export assumed about the sizes of the inputs, as data, and as a function that checks it.

A branch on a size (``if T % 4 == 0``) leaves no trace in a graph but its guard. A graph that runs without checking it
is silently another model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from .errors import InputError
from .program import Guard, Leaf, fixed_size

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


def from_export(sources: Iterable[str], leaves: Sequence[tuple[Leaf, torch.Tensor]]) -> tuple[Guard, ...]:
    """The guards of an export, each once: its own conditions, and one for every dimension that is a fixed number.

    Arguments:
        sources: conditions in the form that `torch.export` keeps them, ``"L['x'].size()[1] % 4 == 0"``.
        leaves: the tensor inputs with the fake tensors that stand for them in the graph.
    """
    names = {leaf.name for leaf, _ in leaves}
    guards: dict[str, Guard] = {}
    for source in sources:
        guard = _convert(source, names)
        if guard is not None:
            guards.setdefault(guard.source, guard)
    for leaf, value in leaves:
        for dim, size in enumerate(value.shape):
            number = fixed_size(size)
            if number is not None:
                guard = make_guard(f'size("{leaf.name}", {dim}) == {number}')
                guards.setdefault(guard.source, guard)
    return tuple(guards.values())


def _convert(source: str, names: set[str]) -> Guard | None:
    def size(match: re.Match[str]) -> str:
        keys = re.findall(r"\[([^\]]*)\]", match.group(1))
        return f'size("{keys[0][1:-1] + "".join(f"[{key}]" for key in keys[1:])}", {match.group(2)})'

    converted = _SIZE.sub(size, source)
    converted = _CAP.sub(r"\1 <= \2", _MIRRORED_CAP.sub(r"\2 <= \1", converted))
    swapped = _SWAPPED.fullmatch(converted)
    if swapped:
        converted = f"{swapped.group(3)} {_MIRROR[swapped.group(2)]} {swapped.group(1)}"
    if "L[" in converted or not all(name in names for name, _ in Guard(converted, "").sizes()):
        return None
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
    return Guard(source, re.sub(r'size\("([^"]*)", (\d+)\)', r"\1.shape[\2]", source))


def allow_batch_of_one(guards: Iterable[Guard], leaf: Leaf) -> tuple[Guard, ...]:
    """The same guards, each of them waived where the batch (dimension 0 of ``leaf``) is 1 and it would forbid that."""
    one = f'size("{leaf.name}", 0) == 1'
    return tuple(
        Guard(f"{one} or ({guard.source})", guard.text) if (leaf.name, 0) in guard.sizes() else guard
        for guard in guards
    )


def excludes_one_value(guard: Guard) -> bool:
    """Whether a guard has the form ``expression != number``.

    >>> excludes_one_value(make_guard('(size("x", 1) // 10) != 22')), excludes_one_value(make_guard('size("x", 1) > 1'))
    (True, False)
    """
    return re.fullmatch(r"[^=<>!]*!= \(?-?\d+\)?", guard.source) is not None


def holds(guard: Guard, sizes: Mapping[tuple[str, int], int]) -> bool:
    """Whether a guard holds at these sizes, ``(leaf, dimension)`` → size.

    >>> holds(make_guard('size("x", 0) % 4 == 0'), {("x", 0): 8})
    True
    """
    scope = {"size": lambda leaf, dim: sizes[leaf, dim], "max": max, "min": min}
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

    scope = {"fail": fail, "fail_rank": fail_rank}
    exec("\n".join(lines), scope)
    return scope["check"]  # type: ignore[return-value]
