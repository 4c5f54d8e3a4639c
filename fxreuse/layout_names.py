"""How the heads of an attention lie in the weights of its projections, in words."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from .attention import AttentionSite
from .errors import UnsupportedError
from .layout import WeightLayout, key_layout, output_layout, query_layout, value_layout
from .program import Program

_READERS = {"queries": query_layout, "keys": key_layout, "values": value_layout, "output": output_layout}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of one attention's projections.

    ``text`` says it (``"q, k, v apart"``, ``"qkv fused, interleaved per head"``), ``weights`` names the weight of the
    queries, keys, values and output, and ``unknown`` has the reason for each of them that cannot be followed.
    """

    text: str
    weights: dict[str, str]
    unknown: dict[str, str]


def layout_of(program: Program, site: AttentionSite) -> Layout:
    """The layout of an attention's projections, as far as it can be read from the graph."""
    found: dict[str, WeightLayout] = {}
    unknown: dict[str, str] = {}
    for name, read in _READERS.items():
        try:
            found[name] = read(program, site)
        except UnsupportedError as error:
            unknown[name] = str(error).removeprefix(f"{site}: ")
    return Layout(_in_words(found), {name: layout.weight for name, layout in found.items()}, unknown)


def _in_words(found: dict[str, WeightLayout]) -> str:
    sides = {name[0]: found[name] for name in ("queries", "keys", "values") if name in found}
    if not sides:
        return "not known"
    shared: dict[str, str] = {}
    for letter, layout in sides.items():
        shared[layout.weight] = shared.get(layout.weight, "") + letter
    unread = [letter for letter in "qkv" if letter not in sides]
    parts = [_fused({letter: sides[letter] for letter in letters}) for letters in shared.values() if len(letters) > 1]
    apart = [letters for letters in shared.values() if len(letters) == 1]
    if apart:
        scattered = [letter for letter in apart if not _in_order(sides[letter].rows)]
        parts.append(f"{', '.join(apart)} apart")
        parts += [f"heads of {', '.join(scattered)} interleaved"] if scattered else []
    if unread:
        parts.append(f"{', '.join(unread)} not known")
    return "; ".join(parts)


def _fused(sides: dict[str, WeightLayout]) -> str:
    """Where the parts of one weight are: each in a block of its own, or side by side for each head."""
    spans = {letter: (int(side.rows.min()), int(side.rows.max())) for letter, side in sides.items()}
    order = sorted(spans, key=lambda letter: spans[letter])
    name = "".join(order)
    if all(spans[a][1] < spans[b][0] for a, b in itertools.pairwise(order)):
        equal = len({side.rows.numel() for side in sides.values()}) == 1
        return f"{name} fused, " + ({2: "halves", 3: "thirds"}[len(order)] if equal else "side by side")
    groups = min(len(side.rows) for side in sides.values())
    blocks = [torch.cat([_share(side.rows, group, groups) for side in sides.values()]) for group in range(groups)]
    if all(int(block.max() - block.min()) + 1 == block.numel() for block in blocks):
        return f"{name} fused, interleaved per {'head' if len({len(s.rows) for s in sides.values()}) == 1 else 'group'}"
    return f"{name} fused, mixed"


def _share(rows: torch.Tensor, group: int, groups: int) -> torch.Tensor:
    """The rows of the heads that belong to one of so many groups."""
    return rows.reshape(groups, -1)[group] if len(rows) % groups == 0 else rows.flatten()


def _in_order(rows: torch.Tensor) -> bool:
    """Whether the rows of a head follow each other."""
    return bool((rows.diff(dim=1) == 1).all()) if rows.shape[1] > 1 else True
