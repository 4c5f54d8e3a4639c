"""A program together with the module that runs it: what its sizes may be, and the memory that a call takes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..frontend.capture import caches_off
from ..frontend.guards import checker, excludes_one_value
from ..frontend.untouched import untouched
from ..program import Leaf, Program
from .memory import peak_bytes
from .sizes import shape
from .tables import Table, check_tables, tables

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Execution:
    """A program, and the module that is called in its place: the original one, or a rewritten one."""

    program: Program
    model: torch.nn.Module | None = None

    def check(self, shapes: Shapes) -> None:
        """Raise where the graph does not hold at these sizes of the inputs.

        Raises:
            InputError: naming the input, the dimension and the condition.
        """
        check = checker(without_single_values(self.program).guards, self.program.call.leaves, self.program.name)
        with self._countable(shapes):
            check(*self._tensors(shapes, "meta"))
        check_tables(self.program.name, self._tables, self._symbols(shapes), _inputs_text(shapes))

    @functools.cached_property
    def _tables(self) -> tuple[Table, ...]:
        return tables(self.program)

    def _symbols(self, shapes: Shapes) -> dict[sympy.Symbol, int]:
        """The sizes by the symbols that the graph has for them."""
        nodes = zip(self.program.call.leaves, self.program.graph.find_nodes(op="placeholder"), strict=True)
        pairs = [pair for leaf, node in nodes for pair in zip(shape(node), shapes[leaf.name], strict=True)]
        return {size: number for size, number in pairs if size.is_Symbol}

    def peak_bytes(self, shapes: Shapes, training: bool) -> int:
        """The peak activation memory of a call at these sizes of the inputs; see `memory.peak_bytes`.

        A module that cannot be run without data is replaced by the graph that was captured of it.

        Raises:
            InputError: at sizes for which a tensor has more bytes than torch can count.
        """
        tensors = self._tensors(shapes, "meta")
        if self.model is not None:
            args, kwargs = self._arguments(dict(zip(shapes, tensors, strict=True)))
            try:
                with untouched(self.model), caches_off(self.model):
                    return peak_bytes(self.model, args, kwargs, training=training)
            except Exception:  # whatever code of others does where there are no values
                pass
        with self._countable(shapes):
            return peak_bytes(self.program.module, tuple(tensors), {}, training=training)

    @contextlib.contextmanager
    def _countable(self, shapes: Shapes) -> Iterator[None]:
        """Turn what torch says of too many bytes into an error that says at which sizes."""
        try:
            yield
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            raise InputError(
                f"{self.program.name}: at {_inputs_text(shapes)} a tensor would take more bytes than torch can count "
                "(2^63). Give smaller sizes."
            ) from error

    def _tensors(self, shapes: Shapes, device: str) -> list[torch.Tensor]:
        """The inputs in order, without data."""
        nodes = self.program.graph.find_nodes(op="placeholder")
        return [
            torch.empty(shapes[leaf.name], dtype=_dtype(node), device=device)
            for leaf, node in zip(self.program.call.leaves, nodes, strict=True)
        ]

    def _arguments(self, tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call of the model, constants included."""
        convention = self.program.call
        given = inspect.Signature(list(convention.parameters)).bind_partial()
        extra = next((p.name for p in convention.parameters if p.kind is p.VAR_KEYWORD), None)
        for argument in convention.arguments:
            leaves = [tensors[leaf.name] if isinstance(leaf, Leaf) else leaf for leaf in argument.leaves]
            value = pytree.tree_unflatten(leaves, argument.spec)
            if argument.name in given.signature.parameters or extra is None:
                given.arguments[argument.name] = value
            else:
                given.arguments.setdefault(extra, {})[argument.name] = value
        return given.args, given.kwargs


def without_single_values(program: Program) -> Program:
    """Without the guards that exclude one value, such as a batch of 1, where there are no weights to try it with.

    A model that branches on one value does the same work there, or less; what it costs is counted as elsewhere.
    """
    if not any(parameter.is_meta for parameter in program.module.parameters()):
        return program
    return dataclasses.replace(program, guards=tuple(g for g in program.guards if not excludes_one_value(g)))


def _inputs_text(shapes: Shapes) -> str:
    """Inputs with their sizes, for an error."""
    return ", ".join(f"{name} of {'×'.join(map(str, sizes))}" for name, sizes in shapes.items())


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype
