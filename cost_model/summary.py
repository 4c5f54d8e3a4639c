"""What a program costs, for people: its counts with readable sizes, and numbers at sizes that they name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import sympy

from ..errors import InputError
from ..program import Program
from .count import Counts, count
from .names import Names, names_of
from .solve import solve


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What a program costs at given sizes. ``sizes`` are the ones that were taken, those derived from others too."""

    params: int
    macs: int
    map_bytes: int
    sizes: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a program costs, as expressions in ``B`` (batch), ``T`` (tokens) and the other free sizes of its inputs.

    One multiply-accumulate counts as 1 MAC; contractions are counted as they are executed, elementwise work is not.
    """

    counts: Counts
    names: Names
    example: Mapping[str, tuple[int, ...]] | None = None

    @property
    def params(self) -> int:
        """The number of scalar parameters, shared ones once."""
        return self.counts.params

    @property
    def macs(self) -> sympy.Expr:
        """The multiply-accumulates of one forward pass."""
        return self.counts.macs

    @property
    def map_bytes(self) -> sympy.Expr:
        """The bytes of the distinct attention maps, each written out in full."""
        return self.counts.map_bytes

    @property
    def symbols(self) -> dict[str, sympy.Symbol]:
        """The symbols of the expressions, by name."""
        free = self.macs.free_symbols | self.map_bytes.free_symbols
        return {str(symbol): symbol for symbol in sorted(free, key=str)}

    def at(self, **sizes: int) -> Numbers:
        """The numbers at these sizes: ``at(B=1, T=512)``, or by input and dimension, ``at(input_ids_1=512)``.

        Where a length is derived from an input, as frames are from audio samples, the smallest input that gives it is
        taken; ``.sizes`` of the result says which.

        Raises:
            InputError: for a name that is unknown, a size that is missing, or sizes that contradict each other.
        """
        for name, size in sizes.items():
            if name not in self.names.sizes:
                raise InputError(f"There is no size {name!r} here. The sizes are: {self._sizes_text()}.")
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise InputError(f"The size {name} is {size!r}, but has to be a whole number, 0 or more.")
        return self._numbers(solve((name, self.names.sizes[name], size) for name, size in sizes.items()))

    def at_example(self, example_sizes: Mapping[str, tuple[int, ...]] | None = None) -> Numbers:
        """The numbers at the sizes of the example inputs.

        Arguments:
            example_sizes: their shapes by the name of the input; where left out, those that the summary was made
                with, and else those that the capture saw, which may have repeated a batch of 1.

        Raises:
            InputError: for an input that is unknown or has another number of dimensions, or a size that does not fit.
        """
        shapes = self.example if example_sizes is None else example_sizes
        if shapes is None:
            return self._numbers(solve((name, self.names.sizes[name], size) for name, size in self.names.hints.items()))
        wanted = []
        for leaf, sizes in shapes.items():
            if leaf not in self.names.inputs:
                raise InputError(f"There is no input {leaf!r}. The inputs are: {', '.join(self.names.inputs)}.")
            expected = self.names.inputs[leaf]
            if len(sizes) != len(expected):
                raise InputError(f"The input {leaf} has {len(expected)} dimensions, but {tuple(sizes)} {len(sizes)}.")
            pairs = zip(expected, sizes, strict=True)
            wanted += [(f"{leaf}, dimension {dim}", *pair) for dim, pair in enumerate(pairs)]
        return self._numbers(solve(wanted))

    def _numbers(self, values: Mapping[sympy.Symbol, int]) -> Numbers:
        missing = [name for name, symbol in self.symbols.items() if symbol not in values]
        if missing:
            raise InputError(f"The size {missing[0]} is missing. The sizes are: {self._sizes_text()}.")
        replaced = {symbol: sympy.Integer(size) for symbol, size in values.items()}
        taken = {name: values[symbol] for name, symbol in self.symbols.items()}
        tokens = self.names.sizes.get("T")
        if tokens is not None and tokens.free_symbols <= values.keys():
            taken["T"] = int(tokens.xreplace(replaced))
        return Numbers(
            params=self.params,
            macs=int(self.macs.xreplace(replaced)),
            map_bytes=int(self.map_bytes.xreplace(replaced)),
            sizes=taken,
        )

    def _sizes_text(self) -> str:
        """Every free size with its other names: ``B (or input_ids_0), T (or input_ids_1)``."""
        texts = []
        for name, symbol in self.symbols.items():
            others = [other for other, size in self.names.sizes.items() if size == symbol and other != name]
            texts.append(f"{name} (or {', '.join(others)})" if others else name)
        derived = self.names.sizes.get("T")
        if derived is not None and not derived.is_Symbol:
            texts.append(f"T = {derived}")
        return ", ".join(texts)


def summarise(program: Program, example_sizes: Mapping[str, tuple[int, ...]] | None = None) -> Summary:
    """Count a program and name its sizes.

    Arguments:
        program: any program, before or after a rewrite.
        example_sizes: the shapes of the example inputs by name, for `Summary.at_example`.

    Raises:
        UnsupportedError: for an operator or a module whose work is not known.

    >>> import torch
    >>> from fxreuse.frontend import load_program
    >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> summary = summarise(load_program(layer, torch.ones(3, 5, 8)))
    >>> summary.params, summary.macs, summary.map_bytes
    (600, 16*B*T**2 + 512*B*T, 8*B*T**2)
    >>> summary.at(B=1, T=100).macs
    211200
    """
    counts = count(program)
    names = names_of(program, counts.maps, counts.macs.free_symbols | counts.map_bytes.free_symbols)
    return Summary(counts.replaced(names.symbols), names, example_sizes)
