"""Many names or numbers that follow a rule, written in few."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

_NUMBER = re.compile(r"(\d+)")


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: runs as ``0…5``, what repeats at equal distances by its beginning and end.

    >>> ranges([0, 1, 2, 3]), ranges([0, 2, 4, 6, 8]), ranges([1, 2, 5])
    ('0…3', '0,2,…,8', '1,2,5')
    >>> ranges([i for i in range(24) if i % 6 != 5]), ranges([])
    ('0…4,6…10,…,18…22', '')
    """
    runs = [list(group) for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    spans = [(run[0][1], run[-1][1]) for run in runs]
    texts = [str(a) if a == b else f"{a},{b}" if b == a + 1 else f"{a}…{b}" for a, b in spans]
    steps = {(c - a, d - b) for (a, b), (c, d) in itertools.pairwise(spans)}
    if len(spans) > 3 and len(steps) == 1 and len(set(next(iter(steps)))) == 1:
        texts = [*texts[:2], "…", texts[-1]]
    return ",".join(texts)


def template(names: Sequence[str], mark: str | None = None) -> str:
    """Names that differ in one number, as one: the numbers in braces, or ``mark`` there. Else the first and the last.

    The second call of a module is ``a.b@1``; the first then counts as ``a.b@0``.

    >>> template(["layer.0.attn", "layer.1.attn", "layer.2.attn"]), template(["h.0.c", "h.1.c"], "i")
    ('layer.{0…2}.attn', 'h.{i}.c')
    >>> template(["block", "block@1", "block@2"]), template(["left", "middle", "right"]), template(["alone"])
    ('block@{0…2}', 'left … right', 'alone')
    """
    if len(set(names)) == 1:
        return names[0]
    for spelled in (list(names), [name if "@" in name else f"{name}@0" for name in names]):
        split = [_NUMBER.split(name) for name in spelled]
        if len({len(parts) for parts in split}) > 1:
            continue
        differing = [place for place, parts in enumerate(zip(*split, strict=True)) if len(set(parts)) > 1]
        if len(differing) == 1 and differing[0] % 2:
            [place] = differing
            numbers = ranges(sorted({int(parts[place]) for parts in split}))
            return "".join([*split[0][:place], "{", mark or numbers, "}", *split[0][place + 1 :]])
    return f"{names[0]} … {names[-1]}"
