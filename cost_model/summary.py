"""What a program costs, for people: its counts with readable sizes, and numbers at sizes that they name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from ..errors import InputError
from ..priors.pruning import SitePruning
from ..program import Program
from .count import Counts, count
from .equal_sizes import equal_sizes
from .execution import Execution
from .names import Names, names_of
from .operations import Operation
from .parts import Parts
from .solve import solve


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What a program costs at given sizes. ``sizes`` are the ones that were taken, those derived from others too.

    ``macs`` are executed, ``macs_algorithmic`` leave out pruned work that the lowering executes all the same.
    ``bytes_moved`` are read and written by operators. ``macs_training`` and ``bytes_training`` are of forward and
    backward together.
    """

    params: int
    weight_bytes: int
    macs: int
    macs_algorithmic: int
    macs_training: int
    map_bytes: int
    bytes_moved: int
    bytes_training: int
    sizes: Mapping[str, int]
    peak: dataclasses.InitVar[Callable[[bool], int]]

    def __post_init__(self, peak: Callable[[bool], int]) -> None:
        object.__setattr__(self, "_peak", peak)

    @functools.cached_property
    def peak_bytes(self) -> int:
        """The peak activation memory of the forward pass on a CPU: see `memory.peak_bytes`."""
        return int(self.__dict__["_peak"](False))

    @functools.cached_property
    def peak_bytes_training(self) -> int:
        """The peak activation memory of forward and backward in training mode, gradients of parameters included."""
        return int(self.__dict__["_peak"](True))


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a program costs, as expressions in ``B`` (batch), ``T`` (tokens) and the other free sizes of its inputs.

    One multiply-accumulate counts as 1 MAC; contractions are counted as they are executed, elementwise work is not.
    Where the length of the layers follows from an input's, as frames follow from audio samples, ``T`` is that of the
    layers; ``relations`` says how.
    """

    counts: Counts
    names: Names
    execution: Execution
    example: Mapping[str, tuple[int, ...]] | None = None

    @property
    def params(self) -> int:
        """The number of scalar parameters, shared ones once."""
        return self.counts.params

    @property
    def weights(self) -> Mapping[torch.dtype, int]:
        """The bytes of the parameters by dtype."""
        return self.counts.weights

    @property
    def weight_bytes(self) -> sympy.Expr:
        """The bytes of all parameters."""
        return sympy.Integer(sum(self.weights.values()))

    @property
    def operations(self) -> tuple[Operation, ...]:
        """Everything that is executed, in order."""
        return self.counts.operations

    @functools.cached_property
    def macs(self) -> sympy.Expr:
        """The multiply-accumulates of one forward pass."""
        return self.counts.macs

    @functools.cached_property
    def macs_algorithmic(self) -> sympy.Expr:
        """Those that the algorithm asks for: without pruned work that is executed all the same."""
        return self.counts.macs_algorithmic

    @functools.cached_property
    def macs_training(self) -> sympy.Expr:
        """The multiply-accumulates of forward and backward."""
        return self.counts.macs_training

    @functools.cached_property
    def map_bytes(self) -> sympy.Expr:
        """The bytes of the distinct attention maps, each written out in full."""
        return self.counts.map_bytes

    @functools.cached_property
    def bytes_moved(self) -> sympy.Expr:
        """The bytes that the operators of one forward pass read and write."""
        return self.counts.bytes_moved

    @functools.cached_property
    def bytes_training(self) -> sympy.Expr:
        """The bytes that the operators of forward and backward read and write."""
        return self.counts.bytes_training

    @functools.cached_property
    def symbols(self) -> dict[str, sympy.Symbol]:
        """The symbols of the expressions, by name."""
        free = self.macs.free_symbols | self.map_bytes.free_symbols
        free |= {symbol for shape in self.names.inputs.values() for size in shape for symbol in size.free_symbols}
        return {str(symbol): symbol for symbol in sorted(free, key=str)}

    @property
    def relations(self) -> dict[str, sympy.Expr]:
        """How lengths follow from the inputs' sizes, by name."""
        tokens = self.names.sizes.get("T")
        return {} if tokens is None or tokens.is_Symbol else {"T": tokens}

    def values(self, **sizes: int) -> dict[sympy.Symbol, int]:
        """The value of every symbol at sizes by name; see `at`."""
        for name, size in sizes.items():
            if name not in self.names.sizes:
                raise InputError(f"There is no size {name!r} here. The sizes are: {self._sizes_text()}.")
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InputError(f"The size {name} is {size!r}, but has to be a whole number, 1 or more.")
        return self._complete(solve((name, self.names.sizes[name], size) for name, size in sizes.items()))

    def at(self, **sizes: int) -> Numbers:
        """The numbers at these sizes: ``at(B=1, T=512)``, or by input and dimension, ``at(input_ids_1=512)``.

        Where a length is derived from an input, as frames are from audio samples, the smallest input that gives it is
        taken; ``.sizes`` of the result says which.

        Raises:
            InputError: for a name that is unknown, a size that is missing or out of the captured range, or sizes that
                contradict each other.
        """
        return self._numbers(self.values(**sizes))

    def at_example(self, example_sizes: Mapping[str, tuple[int, ...]] | None = None) -> Numbers:
        """The numbers at the sizes of the example inputs.

        Arguments:
            example_sizes: their shapes by the name of the input; where left out, those that the summary was made
                with, and else those that the capture saw, which may have repeated a batch of 1.

        Raises:
            InputError: for an input that is unknown or has another number of dimensions, or a size that does not fit.
        """
        return self._numbers(self.values_of_example(example_sizes))

    def values_of_example(self, example_sizes: Mapping[str, tuple[int, ...]] | None = None) -> dict[sympy.Symbol, int]:
        """The value of every symbol at the sizes of the example inputs; see `at_example`."""
        shapes = self.example if example_sizes is None else example_sizes
        if shapes is None:
            hints = self.names.hints.items()
            return self._complete(solve((name, self.names.sizes[name], size) for name, size in hints))
        wanted = []
        for leaf, sizes in shapes.items():
            if leaf not in self.names.inputs:
                raise InputError(f"There is no input {leaf!r}. The inputs are: {', '.join(self.names.inputs)}.")
            expected = self.names.inputs[leaf]
            if len(sizes) != len(expected):
                raise InputError(f"The input {leaf} has {len(expected)} dimensions, but {tuple(sizes)} {len(sizes)}.")
            pairs = zip(expected, sizes, strict=True)
            wanted += [(f"{leaf}, dimension {dim}", *pair) for dim, pair in enumerate(pairs)]
        return self._complete(solve(wanted))

    def _complete(self, values: dict[sympy.Symbol, int]) -> dict[sympy.Symbol, int]:
        """The values with those of derived lengths; every symbol has one, and the capture allows them."""
        numbers = {symbol: sympy.Integer(size) for symbol, size in values.items()}
        for name, length in self.relations.items():
            if length.free_symbols <= values.keys() and name in self.symbols:
                values[self.symbols[name]] = int(length.xreplace(numbers))
        self._fill(values)
        missing = [name for name, symbol in self.symbols.items() if symbol not in values]
        if missing:
            raise InputError(f"The size {missing[0]} is missing. The sizes are: {self._sizes_text()}.")
        self.execution.check(self._shapes(values))
        return values

    def _fill(self, values: dict[sympy.Symbol, int]) -> None:
        """Sizes of inputs that no contraction depends on, such as the batch of a mask, are as ``B`` and ``T``."""
        needed = self.macs.free_symbols | self.map_bytes.free_symbols
        for shape in self.names.inputs.values():
            for index, size in enumerate(shape):
                like = self.symbols.get("T" if index else "B")
                if size.is_Symbol and size not in needed and like in values:
                    values.setdefault(size, values[like])

    def _shapes(self, values: Mapping[sympy.Symbol, int]) -> dict[str, tuple[int, ...]]:
        numbers = {symbol: sympy.Integer(size) for symbol, size in values.items()}
        return {leaf: tuple(int(size.xreplace(numbers)) for size in shape) for leaf, shape in self.names.inputs.items()}

    def _numbers(self, values: Mapping[sympy.Symbol, int]) -> Numbers:
        numbers = {symbol: sympy.Integer(size) for symbol, size in values.items()}
        names = [
            "macs", "macs_algorithmic", "macs_training", "map_bytes", "bytes_moved", "bytes_training", "weight_bytes",
        ]  # fmt: skip
        return Numbers(
            params=self.params,
            sizes={name: values[symbol] for name, symbol in self.symbols.items()} | self._derived(numbers),
            peak=functools.partial(self.execution.peak_bytes, self._shapes(values)),
            **{name: int(getattr(self, name).xreplace(numbers)) for name in names},
        )

    def _derived(self, numbers: Mapping[sympy.Symbol, sympy.Integer]) -> dict[str, int]:
        return {name: int(length.xreplace(numbers)) for name, length in self.relations.items()}

    def _sizes_text(self) -> str:
        """Every free size with its other names: ``B (or input_ids_0), T (or input_ids_1)``."""
        texts = []
        for name, symbol in self.symbols.items():
            others = [other for other in self.names.hints if self.names.sizes[other] == symbol and other != name]
            if name in self.relations:
                continue
            texts.append(f"{name} (or {', '.join(others)})" if others else name)
        return ", ".join([*texts, *(f"{name} = {length}" for name, length in self.relations.items())])


def summarise(
    program: Program,
    example_sizes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    parts: Parts | None = None,
    pruned: Sequence[SitePruning] = (),
    model: torch.nn.Module | None = None,
) -> Summary:
    """Count a program and name its sizes.

    Arguments:
        program: any program, before or after a rewrite.
        example_sizes: the shapes of the example inputs by name, for `Summary.at_example`.
        parts: the parts of the program that it was captured as.
        pruned: what pruning by priors did to its attentions, as `describe` says.
        model: the module that is called, whose peak memory is meant; the program's graph where left out.

    Raises:
        UnsupportedError: for an operator or a module whose work is not known.

    >>> import torch
    >>> from fxreuse.frontend.load import load_program
    >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> summary = summarise(load_program(layer, torch.ones(3, 5, 8)))
    >>> summary.params, summary.macs, summary.map_bytes
    (600, 16*B*T**2 + 512*B*T, 8*B*T**2)
    >>> summary.at(B=1, T=100).macs
    211200
    """
    counts = count(program, parts, pruned)
    if whole := _whole_quotients(counts):
        counts = counts.replaced(whole)
    if same := equal_sizes(program):
        counts = counts.replaced(same)
    names = names_of(program, counts.maps, counts.macs.free_symbols | counts.map_bytes.free_symbols, same)
    counts = counts.replaced(names.symbols)
    if names.derived:
        counts = counts.replaced(names.derived)
    return Summary(counts, names, Execution(program, model), example_sizes)


def _whole_quotients(counts: Counts) -> dict[sympy.Expr, sympy.Expr]:
    """What sizes that a capture wrote as ``T²//T``, rounded down where nothing is left over, are without rounding."""
    sizes = {size for operation in counts.operations for shape in operation.shapes for size in shape}
    divisions = {floor: sympy.cancel(floor.args[0] / floor.args[1]) for floor in _floors(sizes)}
    return {floor: quotient for floor, quotient in divisions.items() if _is_whole(quotient)}


def _floors(sizes: Iterable[sympy.Expr]) -> set[sympy.Expr]:
    return {floor for size in sizes for floor in size.atoms(FloorDiv)}


def _is_whole(quotient: sympy.Expr) -> bool:
    """Whether an expression is made of whole numbers by sums and products."""
    free = quotient.free_symbols
    return bool(free) and quotient.is_polynomial(*free) and all(c.is_Integer for c in sympy.Poly(quotient).coeffs())
