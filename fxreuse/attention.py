"""What an attention is to this package: the vocabulary that recognition, plans and passes share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import sympy
from tabulate import tabulate

from .length_text import length_text
from .tokens import Tokens


@dataclasses.dataclass(frozen=True)
class SiteNodes:
    """The names of an attention's nodes in the program's graph.

    ``map`` is the node whose value is the attention map before dropout: a softmax, what suppression and
    renormalisation make of it, or the fused operator itself.
    ``contexts`` are the nodes that contract the map with values (several where one map has several consumers);
    of a fused operator it is the operator. ``query`` and ``key`` are the operands of the product that makes the scores
    and ``scores`` the input of the softmax; ``mask`` is the ``attn_mask`` of a fused operator. What is not there is
    None. ``axis`` is the dimension of the map, from the last one on, along which a softmax makes it sum to 1.
    """

    map: str
    contexts: tuple[str, ...]
    query: str | None
    key: str | None
    values: tuple[str, ...]
    mask: str | None
    scores: str | None
    axis: int = -1


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One attention of a model.

    ``path`` is the module call that it happens in (``encoder.layer.3.attention.self``; ``a.b@1`` is the second call of
    ``a.b``) and ``order`` its number among the softmaxes and fused attentions of that call. ``stack`` names the stack
    that it belongs to, ``layer`` its place there and ``layer_path`` the module call that is this layer.
    ``map_shape`` is the symbolic shape of its map, ``(batch, heads, queries, keys)``. ``mask`` names what masks it
    (``"none"``, ``"causal"``, ``"padding"`` …); two sites whose ``mask_key`` are equal are masked by the same values.
    ``bias`` says what is added to its scores. ``tokens`` says over which tokens the axes of the map go, as far as that
    can be told.
    """

    path: str
    order: int
    stack: str
    layer: int
    layer_path: str
    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    fused: bool
    map_shape: tuple[Any, ...]
    mask: str
    mask_key: str
    bias: str
    nodes: SiteNodes
    tokens: Tokens = dataclasses.field(default_factory=Tokens)

    def __str__(self) -> str:
        return self.path if self.order == 0 else f"{self.path}#{self.order}"


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A softmax that was not taken as an attention, the reason, and the line of the model's code that it is in."""

    path: str
    node: str
    reason: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.path or '(root)'} {self.node}: {self.reason}" + (f" ({self.source})" if self.source else "")


class AttentionSites(Sequence[AttentionSite]):
    """The attentions of a model in the order of execution, with what was not taken and why. Prints as a table.

    ``sizes`` says which size of which input a symbol in a ``map_shape`` stands for (``s70`` → ``input_ids.shape[1]``).
    """

    def __init__(
        self,
        sites: Sequence[AttentionSite],
        rejected: Sequence[Rejected] = (),
        sizes: Mapping[str, str] | None = None,
    ) -> None:
        self._sites = tuple(sites)
        self.rejected = tuple(rejected)
        self.sizes = dict(sizes or {})

    @overload
    def __getitem__(self, index: int) -> AttentionSite: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[AttentionSite]: ...
    def __getitem__(self, index: int | slice) -> AttentionSite | Sequence[AttentionSite]:
        return self._sites[index]

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[AttentionSite]:
        return iter(self._sites)

    @property
    def stacks(self) -> dict[str, tuple[AttentionSite, ...]]:
        """The sites of every stack, in layer order."""
        stacks: dict[str, list[AttentionSite]] = {}
        for site in self._sites:
            stacks.setdefault(site.stack, []).append(site)
        return {name: tuple(sorted(sites, key=lambda s: s.layer)) for name, sites in stacks.items()}

    def __str__(self) -> str:
        headers = ["stack", "layer", "site", "kind", "heads", "head dim", "map", "fused", "mask", "bias"]
        letters = self.letters()
        rows = [
            [
                site.stack,
                site.layer,
                str(site),
                site.kind,
                site.heads if site.heads == site.kv_heads else f"{site.heads}/{site.kv_heads}",
                site.head_dim if site.head_dim == site.value_dim else f"{site.head_dim}/{site.value_dim}",
                "×".join(letters.get(str(size), str(size)) for size in site.map_shape),
                "yes" if site.fused else "no",
                site.mask,
                site.bias,
            ]
            for site in self._sites
        ]
        lines = [tabulate(rows, headers=headers, disable_numparse=True)] if rows else ["no attention found"]
        lines += [f"{letter} = {self.in_words(size)}" for size, letter in letters.items()]
        lines += [f"not attention: {rejected}" for rejected in self.rejected]
        return "\n".join(lines)

    def letters(self) -> dict[str, str]:
        """A letter for every size of a map that is not a number: B for batches, T for lengths, numbered if several."""
        letters: dict[str, str] = {}
        for name, axes in (("B", (0,)), ("T", (2, 3))):
            sizes = dict.fromkeys(str(site.map_shape[axis]) for site in self._sites for axis in axes)
            free = [size for size in sizes if not size.isdigit() and size not in letters]
            letters.update({size: f"{name}{i + 1}" if len(free) > 1 else name for i, size in enumerate(free)})
        return letters

    def in_words(self, size: str) -> str:
        """A size of a map, with the input's own sizes in place of symbols: ``⌊input_values.shape[1]/320⌋ + 1``."""
        expressions = {str(found): sympy.sympify(found) for site in self._sites for found in site.map_shape}
        expression = expressions[size]
        named = {symbol: sympy.Symbol(self.sizes.get(symbol.name, symbol.name)) for symbol in expression.free_symbols}
        return length_text(expression.xreplace(named))

    __repr__ = __str__
