"""Parameters, multiply-accumulates, bytes and attention maps of a program, as expressions in its sizes."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import sympy
import torch

from ..priors.pruning import SitePruning, unskipped_macs
from ..program import Program
from .backward import backward
from .data_sizes import data_sizes
from .maps import AttentionMap, attention_maps
from .operations import Operation, operations_of
from .parts import Parts
from .walk import walk


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a program holds and executes, in the symbols of its capture.

    ``params`` counts every Parameter of the module tree once, however many paths it has, and ``weights`` has their
    bytes by dtype. ``params_by_module`` parts them by the module that holds them. ``operations`` is all that is
    executed, ``maps`` are the distinct attention maps, and ``unskipped`` are the multiply-accumulates of pruned scores
    that are executed all the same.
    """

    params: int
    weights: Mapping[torch.dtype, int]
    params_by_module: Mapping[str, int]
    operations: tuple[Operation, ...]
    maps: tuple[AttentionMap, ...]
    unskipped: sympy.Expr = sympy.S.Zero

    @functools.cached_property
    def macs(self) -> sympy.Expr:
        """The multiply-accumulates of one forward pass."""
        return total(operation.macs for operation in self.operations)

    @property
    def macs_algorithmic(self) -> sympy.Expr:
        """Those that the algorithm asks for: without pruned work that is executed all the same."""
        return sympy.expand(self.macs - self.unskipped)

    @property
    def macs_training(self) -> sympy.Expr:
        """The multiply-accumulates of forward and backward."""
        return self.macs + total(cost.macs for cost in backward(self.operations))

    @property
    def bytes_moved(self) -> sympy.Expr:
        """The bytes that the operators of one forward pass read and write."""
        return total(operation.bytes for operation in self.operations)

    @property
    def bytes_training(self) -> sympy.Expr:
        """The bytes that the operators of forward and backward read and write."""
        return self.bytes_moved + total(cost.bytes for cost in backward(self.operations))

    @property
    def macs_by_op(self) -> dict[str, sympy.Expr]:
        """The multiply-accumulates by operator (``aten.linear``)."""
        return self.macs_by(lambda operation: operation.op)

    @property
    def macs_by_kind(self) -> dict[str, sympy.Expr]:
        """The multiply-accumulates by kind of operator (see `kinds.KINDS`)."""
        return self.macs_by(lambda operation: operation.kind)

    @property
    def macs_by_module(self) -> dict[str, sympy.Expr]:
        """By the innermost module call (``encoder.layer.3.attention``; empty for the outermost)."""
        return self.macs_by(lambda operation: operation.module)

    @property
    def macs_by_layer(self) -> dict[str, sympy.Expr]:
        """By layer; empty outside of all."""
        return self.macs_by(lambda operation: operation.layer)

    @property
    def macs_by_part(self) -> dict[str, sympy.Expr]:
        """By part of the model (see `parts.PARTS`)."""
        return self.macs_by(lambda operation: operation.part)

    def macs_by(self, key: Callable[[Operation], str]) -> dict[str, sympy.Expr]:
        """The multiply-accumulates of the operations with each key, where there are any."""
        found: defaultdict[str, list[sympy.Expr]] = defaultdict(list)
        for operation in self.operations:
            if operation.macs != 0:
                found[key(operation)].append(operation.macs)
        return {name: total(macs) for name, macs in found.items()}

    @property
    def map_bytes(self) -> sympy.Expr:
        """What the distinct attention maps take together, each written out in full."""
        return total(found.bytes for found in self.maps)

    def replaced(self, symbols: Mapping[sympy.Expr, sympy.Expr]) -> Counts:
        """The same counts with other symbols."""
        return dataclasses.replace(
            self,
            unskipped=self.unskipped.xreplace(symbols),
            operations=tuple(operation.replaced(symbols) for operation in self.operations),
            maps=tuple(
                dataclasses.replace(found, shape=tuple(size.xreplace(symbols) for size in found.shape))
                for found in self.maps
            ),
        )


def count(program: Program, parts: Parts | None = None, pruned: Sequence[SitePruning] = ()) -> Counts:
    """Count a program, outlined layers included.

    Arguments:
        program: any program, before or after a rewrite.
        parts: the parts of the program that it was captured as, for `Counts.macs_by_layer` and `Counts.macs_by_part`.
        pruned: what pruning by priors did to its attentions, for `Counts.macs_algorithmic`.

    Raises:
        UnsupportedError: for an operator or a module whose work is not known.
    """
    steps = walk(program.module)
    weights: defaultdict[torch.dtype, int] = defaultdict(int)
    by_module: defaultdict[str, int] = defaultdict(int)
    for path, parameter in program.module.named_parameters():
        weights[parameter.dtype] += parameter.numel() * parameter.element_size()
        by_module[path.rpartition(".")[0]] += parameter.numel()
    counts = Counts(
        params=sum(by_module.values()),
        weights=dict(weights),
        params_by_module=dict(by_module),
        operations=tuple(operations_of(steps, parts)),
        maps=tuple(attention_maps(steps)),
        unskipped=unskipped_macs(pruned),
    )
    known = data_sizes(steps)
    return counts.replaced(known) if known else counts


def total(parts: Iterable[sympy.Expr]) -> sympy.Expr:
    """The sum, multiplied out. Layers are alike, and so are most of its parts: each is multiplied out once."""
    times = Counter(parts)
    return sympy.Add(*(number * sympy.expand(part) for part, number in times.items()))
