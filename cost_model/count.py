"""Parameters, multiply-accumulates and attention-map bytes of a program, as expressions in its sizes."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping

import sympy

from ..program import Program, module_path
from .leaves import leaf_macs
from .macs import macs_of
from .maps import AttentionMap, attention_maps
from .sizes import operator_name
from .walk import Step, walk


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a program holds and executes, in the symbols of its capture.

    ``params`` counts every Parameter of the module tree once, however many paths it has. ``macs_by_op`` and
    ``macs_by_module`` part ``macs`` by operator (``aten.linear``) and by the innermost module call
    (``encoder.layer.3.attention``; empty for the outermost). ``maps`` are the distinct attention maps.
    """

    params: int
    macs: sympy.Expr
    macs_by_op: Mapping[str, sympy.Expr]
    macs_by_module: Mapping[str, sympy.Expr]
    maps: tuple[AttentionMap, ...]

    @property
    def map_bytes(self) -> sympy.Expr:
        """What the distinct attention maps take together, each written out in full."""
        return _total(found.bytes for found in self.maps)

    def replaced(self, symbols: Mapping[sympy.Symbol, sympy.Expr]) -> Counts:
        """The same counts with other symbols."""
        return Counts(
            self.params,
            self.macs.xreplace(symbols),
            {name: part.xreplace(symbols) for name, part in self.macs_by_op.items()},
            {path: part.xreplace(symbols) for path, part in self.macs_by_module.items()},
            tuple(
                dataclasses.replace(found, shape=tuple(size.xreplace(symbols) for size in found.shape))
                for found in self.maps
            ),
        )


def count(program: Program) -> Counts:
    """Count a program, outlined layers included.

    Raises:
        UnsupportedError: for an operator or a module whose work is not known.
    """
    steps = walk(program.module)
    by_op: defaultdict[str, list[sympy.Expr]] = defaultdict(list)
    by_module: defaultdict[str, list[sympy.Expr]] = defaultdict(list)
    for step in steps:
        name, macs = _work(step)
        if macs != 0:
            by_op[name].append(macs)
            by_module[module_path(step.node) or step.path].append(macs)
    macs_by_op = {name: _total(parts) for name, parts in by_op.items()}
    return Counts(
        params=sum(parameter.numel() for parameter in program.module.parameters()),
        macs=_total(macs_by_op.values()),
        macs_by_op=macs_by_op,
        macs_by_module={path: _total(parts) for path, parts in by_module.items()},
        maps=tuple(attention_maps(steps)),
    )


def _work(step: Step) -> tuple[str, sympy.Expr]:
    """The operator of a step and its multiply-accumulates."""
    if step.leaf is not None:
        return leaf_macs(step.leaf, step.node)
    return operator_name(step.node), macs_of(step.node)


def _total(parts: Iterable[sympy.Expr]) -> sympy.Expr:
    return sympy.expand(sympy.Add(*parts))
