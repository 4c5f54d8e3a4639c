"""How the heads of an attention lie in the weights of its projections, in words."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import torch

from ..attention import AttentionSite
from ..errors import UnsupportedError
from ..finding.flow import Flow, value_operands
from ..program import Program
from .layout import WeightLayout, key_layout, output_layout, query_layout, value_layout
from .projections import read_projection

_READERS: Mapping[str, Callable[[Program, AttentionSite], WeightLayout]] = {
    "queries": query_layout,
    "keys": key_layout,
    "values": value_layout,
    "output": output_layout,
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of one attention's projections.

    ``text`` says it (``"q, k, v apart"``, ``"qkv fused, interleaved per head"``), ``weights`` names the weight of the
    queries, keys, values and output, and ``unread`` has the reason where it is not known which of its rows feeds which
    channel, as behind a rotary embedding.
    """

    text: str
    weights: Mapping[str, str]
    unread: Mapping[str, str]


class LayoutNames:
    """The layouts of the attentions of a program."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._flow = Flow(program)

    def of(self, site: AttentionSite) -> Layout:
        """The layout of an attention's projections, as far as it can be read from the graph."""
        weights: dict[str, str] = {}
        rows: dict[str, torch.Tensor] = {}
        unread: dict[str, str] = {}
        for name, read in _READERS.items():
            try:
                found = read(self._program, site)
            except UnsupportedError as error:
                unread[name] = str(error).removeprefix(f"{site}: ")
                behind = self._behind(_operand(site, name))
                if len(behind) == 1:
                    weights[name] = behind.pop()
            else:
                weights[name], rows[name] = found.weight, found.rows
        return Layout(_in_words(weights, rows), weights, unread)

    def _behind(self, operand: str | None) -> set[str]:
        """The weights of the nearest projections behind an operand, through whatever is done to their results."""
        if operand is None:
            return set()
        found: set[str] = set()
        pending = [self._program.node(operand)]
        seen = set(pending)
        while pending:
            node = pending.pop()
            projection = read_projection(self._program, node)
            if projection is not None:
                found.add(projection.weight)
                continue
            ahead = [o for o in value_operands(node) if o in self._flow.tokens and o not in seen]
            seen.update(ahead)
            pending.extend(ahead)
        return found


def _operand(site: AttentionSite, name: str) -> str | None:
    """The operand of an attention that a projection feeds."""
    nodes = site.nodes
    return {"queries": nodes.query, "keys": nodes.key, "values": nodes.values[0]}.get(name)


def _in_words(weights: Mapping[str, str], rows: Mapping[str, torch.Tensor]) -> str:
    sides = {name[0]: weights[name] for name in ("queries", "keys", "values") if name in weights}
    known = {name[0]: rows[name] for name in rows if name[0] in sides}
    shared: dict[str, str] = {}
    for letter, weight in sides.items():
        shared[weight] = shared.get(weight, "") + letter
    parts = [_fused(letters, known) for letters in shared.values() if len(letters) > 1]
    apart = [letters for letters in shared.values() if len(letters) == 1]
    if apart:
        parts.append(f"{', '.join(apart)} apart")
    scattered = [letter for letter in apart if letter in known and not _in_order(known[letter])]
    if scattered:
        parts.append(f"heads of {', '.join(scattered)} interleaved")
    missing = [letter for letter in "qkv" if letter not in sides]
    if missing:
        parts.append(f"{', '.join(missing)} not known")
    return "; ".join(parts)


def _fused(letters: str, known: Mapping[str, torch.Tensor]) -> str:
    """Where the parts of one weight are: each in a block of its own, or side by side for each head."""
    read = {letter: known[letter] for letter in letters if letter in known}
    if len(read) < len(letters):
        return f"{letters} fused, {_of_one(next(iter(read.values())))}" if read else f"{letters} fused"
    spans = {letter: (int(rows.min()), int(rows.max())) for letter, rows in read.items()}
    order = sorted(spans, key=lambda letter: spans[letter])
    name = "".join(order)
    if all(spans[one][1] < spans[other][0] for one, other in itertools.pairwise(order)):
        equal = len({rows.numel() for rows in read.values()}) == 1
        return f"{name} fused, " + ({2: "halves", 3: "thirds"}[len(order)] if equal else "side by side")
    heads = {len(rows) for rows in read.values()}
    blocks = [torch.cat([rows.reshape(min(heads), -1)[i] for rows in read.values()]) for i in range(min(heads))]
    if all(int(block.max() - block.min()) + 1 == block.numel() for block in blocks):
        return f"{name} fused, interleaved per {'head' if len(heads) == 1 else 'group of heads'}"
    return f"{name} fused, mixed"


def _of_one(rows: torch.Tensor) -> str:
    """The same, from the rows of one part alone: its heads follow each other, or leave room for others."""
    if not _in_order(rows):
        return "mixed"
    together = len(rows) == 1 or bool((rows[1:, 0] == rows[:-1, -1] + 1).all())
    return "side by side" if together else "interleaved per head"


def _in_order(rows: torch.Tensor) -> bool:
    """Whether the rows of a head follow each other."""
    return rows.shape[1] == 1 or bool((rows.diff(dim=1) == 1).all())
