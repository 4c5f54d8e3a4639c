"""How far the tables of a program reach: positions that are rows of a table are fewer than it has rows.

A capture does not say so: an index is data to it. But positions are made of sizes, and what a tensor of them holds is
worked out exactly (`fxreuse.masks`). An index that depends on data, is clamped or put into buckets has no one formula,
and bounds nothing here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import sympy
import torch
from torch import fx

from ..errors import InputError
from ..masks.index_call import is_tensor, sizes_of
from ..masks.index_forms import Affine, Cases
from ..masks.index_interpreter import IndexForms
from ..program import Program, fixed_size
from .sizes import operands, operator_name

_TABLE_AND_INDEX = {"aten.embedding": (0, 1), "aten.index_select": (0, 2)}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table, its rows, the highest one that is read, and the sizes of the tensor of indices."""

    name: str
    rows: int
    highest: sympy.Expr
    sizes: tuple[sympy.Expr, ...]


def tables(program: Program) -> tuple[Table, ...]:
    """The tables whose rows are read at places that sizes alone decide.

    >>> from fxreuse.frontend.load import load_program
    >>> class Positions(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.table = torch.nn.Embedding(64, 8)
    ...     def forward(self, x):
    ...         return x + self.table(torch.arange(x.shape[1]) + 2)
    >>> [table] = tables(load_program(Positions(), torch.ones(2, 5, 8)))
    >>> table.name, table.rows
    ('table', 64)
    >>> check_tables("Positions", [table], {symbol: 63 for symbol in table.highest.free_symbols}, "x of 2×63×8")
    Traceback (most recent call last):
    fxreuse.errors.InputError: Positions: table has 64 rows, 0 to 63; found x of 2×63×8, which would read row 64. ...
    """
    forms = IndexForms(program.graph)
    found = []
    for name, rows, index in _lookups(program):
        value = forms[index]
        form = value.single if isinstance(value, Cases) else None
        if not isinstance(form, Affine):
            continue
        sizes = sizes_of(index)
        highest = form.const + sum(a * (size - 1) for a, size in zip(form.coeffs, sizes, strict=True) if a > 0)
        if sympy.sympify(highest).free_symbols:
            found.append(Table(name, rows, sympy.expand(highest), sizes))
    return tuple(dict.fromkeys(found))


def check_tables(program: str, found: Sequence[Table], sizes: Mapping[sympy.Symbol, int], inputs: str) -> None:
    """Raise where a table has fewer rows than are read at these sizes.

    Arguments:
        program: its name.
        found: its tables.
        sizes: the value of every symbol.
        inputs: the sizes of its inputs in words.

    Raises:
        InputError: naming the table, its rows, the sizes asked for and what would be read.
    """
    numbers = {symbol: sympy.Integer(size) for symbol, size in sizes.items()}
    for table in found:
        highest = table.highest.xreplace(numbers)
        if not highest.is_Integer or highest < table.rows or any(size.xreplace(numbers) == 0 for size in table.sizes):
            continue
        raise InputError(
            f"{program}: {table.name} has {table.rows:,} rows, 0 to {table.rows - 1:,}; found {inputs}, which would "
            f"read row {int(highest):,}. Ask for a length that is shorter by {int(highest) - table.rows + 1:,} rows, "
            "or build the model with a larger table."
        )


def _lookups(program: Program) -> Iterator[tuple[str, int, fx.Node]]:
    """Every reading of a table's rows: the name of the table, its rows, and the indices."""
    for node in program.graph.nodes:
        if node.op == "call_module":
            module = program.module.get_submodule(str(node.target))
            if isinstance(module, torch.nn.Embedding) and is_tensor(node.args[0]):
                yield str(node.target), module.num_embeddings, node.args[0]
            continue
        place = _TABLE_AND_INDEX.get(operator_name(node))
        if place is None:
            continue
        given = operands(node)
        table, index = (given[position] for position in place)
        if operator_name(node) == "aten.index_select" and given[1] != 0:
            continue
        rows = fixed_size(table.meta["val"].shape[0])
        if rows is not None and is_tensor(index):
            yield str(table.target if table.op == "get_attr" else table.name).removesuffix(".weight"), rows, index
