"""The length N that priors are over: fixed where a model is not causal, bounded where it is.

A prior has an entry for every query and key, so their numbers have to be known. Where they are free in the capture, a
causal model keeps them free up to the length of the example: its leading queries see its leading keys only, and use the
leading part of the prior. Any other model is captured anew with its lengths fixed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram

from ..attention import AttentionSite, AttentionSites
from ..errors import PlanError
from ..finding.find import find
from ..plans.plan import Plan
from ..plans.plan_fiak import Fiak
from ..plans.stack_choice import choose_stack_of_self_attention
from ..program import Guard, Program, fixed_size
from .example_sizes import Place
from .guards import make_guard
from .leaves import example_leaves
from .load import load_program

_UPPER = re.compile(r'size\("([^"]*)", (\d+)\) <= (\d+)')


def bound_lengths(
    model: torch.nn.Module | ExportedProgram, example_inputs: Any, program: Program, sites: AttentionSites, plan: Plan
) -> tuple[Program, AttentionSites]:
    """The program and its sites with every length known or bounded that a fiak pass of the plan is over.

    Raises:
        PlanError: a length of an exported program is free and has no bound.
    """
    stacks = [choose_stack_of_self_attention(step, sites) for step in plan.passes if isinstance(step, Fiak)]
    free = [site for stack in stacks for site in sites.stacks[stack] if free_lengths(site)]
    if not free:
        return program, sites
    if all(_can_stay_free(program, site) for site in free):
        return _bounded(model, example_inputs, program, free), sites
    if isinstance(model, ExportedProgram):
        site = next(site for site in free if not _can_stay_free(program, site))
        raise PlanError(
            f"{site}: a prior has an entry for every query and key, but the length {sites.in_words(_length(site))} of "
            "this exported program is dynamic, and its attention is not causal; export it with the length fixed"
        )
    fixed = load_program(model, example_inputs, only_free=_batches(program, free))
    return fixed, find(fixed)


def free_lengths(site: AttentionSite) -> set[sympy.Symbol]:
    """The symbols in the numbers of queries and keys of a site."""
    return {symbol for size in site.map_shape[2:] for symbol in sympy.sympify(size).free_symbols}


def upper_bounds(guards: Sequence[Guard]) -> dict[tuple[str, int], int]:
    """The largest size that each dimension of an input may have, where guards say so."""
    found: dict[tuple[str, int], int] = {}
    for guard in guards:
        match = _UPPER.fullmatch(guard.source)
        if match:
            place = match[1], int(match[2])
            found[place] = min(int(match[3]), found.get(place, int(match[3])))
    return found


def length_bounds(program: Program) -> dict[sympy.Symbol, int]:
    """The upper bounds that guards give the free sizes of the inputs."""
    known = upper_bounds(program.guards)
    bounds: dict[sympy.Symbol, int] = {}
    for symbol, places in _places(program).items():
        found = [known[place] for place in places if place in known]
        if found:
            bounds[symbol] = min(found)
    return bounds


def _can_stay_free(program: Program, site: AttentionSite) -> bool:
    """Whether leading queries see leading keys only, and the length is a size of an input."""
    queries, keys = site.map_shape[2:]
    return "causal" in site.mask.split("+") and queries == keys and queries in _places(program)


def _bounded(
    model: torch.nn.Module | ExportedProgram, example_inputs: Any, program: Program, sites: Sequence[AttentionSite]
) -> Program:
    """The program with the length of the example as a bound."""
    symbols = {symbol for site in sites for symbol in free_lengths(site)}
    known = length_bounds(program)
    if isinstance(model, ExportedProgram):
        for symbol in symbols - known.keys():
            leaf, dim = _places(program)[symbol][0]
            raise PlanError(
                f"{sites[0]}: a prior has an entry for every query and key, but {leaf}.shape[{dim}] of this exported "
                "program is dynamic without a bound; export it with torch.export.Dim(..., max=N)"
            )
        return program
    shapes = _example_shapes(model, example_inputs, program)
    guards = [
        make_guard(f'size("{leaf}", {dim}) <= {shapes[leaf][dim]}')
        for symbol in sorted(symbols, key=str)
        for leaf, dim in _places(program)[symbol]
    ]
    return dataclasses.replace(program, guards=(*program.guards, *guards))


def _example_shapes(model: torch.nn.Module, example_inputs: Any, program: Program) -> Mapping[str, tuple[int, ...]]:
    tensors = example_leaves(model, program.call, example_inputs)
    assert tensors is not None
    return {leaf.name: tuple(tensor.shape) for leaf, tensor in zip(program.call.leaves, tensors, strict=True)}


def _places(program: Program) -> dict[sympy.Symbol, list[Place]]:
    """Where each free size of the inputs stands: input and dimension."""
    found: dict[sympy.Symbol, list[tuple[str, int]]] = {}
    for leaf, node in zip(program.call.leaves, program.graph.find_nodes(op="placeholder"), strict=True):
        for dim, size in enumerate(node.meta["val"].shape):
            if fixed_size(size) is None and size.node.expr.is_Symbol:
                found.setdefault(size.node.expr, []).append((leaf.name, dim))
    return found


def _batches(program: Program, sites: Sequence[AttentionSite]) -> frozenset[Place]:
    """What stays free where the lengths of some sites are fixed: their batch, and the first size of every input.

    A length may be the first size itself, as in models that have tokens before the batch.
    """
    lengths = {symbol for site in sites for symbol in free_lengths(site)}
    batch = {symbol for site in sites for symbol in sympy.sympify(site.map_shape[0]).free_symbols}
    return frozenset(
        place
        for symbol, places in _places(program).items()
        for place in places
        if symbol not in lengths and (symbol in batch or place[1] == 0)
    )


def _length(site: AttentionSite) -> str:
    return str(next(size for size in site.map_shape[2:] if not str(size).isdigit()))
