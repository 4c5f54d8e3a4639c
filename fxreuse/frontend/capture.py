"""Capture: a model and example inputs become a `Program`, through `torch.export`."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..errors import CaptureError, InputError
from ..program import Argument, CallingConvention, Leaf, Program, fixed_size, kind_of
from ..record import Note
from . import guards as guarding
from .capture_errors import capture_error, first_line, line_at_fault
from .conversions import idle_conversions
from .example_sizes import Place, free_shapes, rows_are_free, shorten, widen_batch
from .exported import arguments_of
from .inputs import Inputs, bind, normalise
from .leaves import leaf_name
from .mode_modules import marked
from .named_keywords import named_keywords
from .quiet import quiet_export
from .shortcuts import compiled_when_run, numbers_remembered
from .training import probe
from .unrewritable import refuse_flex_attention, refuse_unrewritable
from .untouched import untouched
from .witness import mark_dtypes

# The number of layers from which keeping the sizes of results makes an export faster.
_MANY_LAYERS = 7


def capture(
    model: torch.nn.Module | ExportedProgram, example_inputs: Any = None, only_free: frozenset[Place] | None = None
) -> Program:
    """Capture a model as one flat graph with free sizes.

    Batch and lengths stay free wherever the model allows it; image axes are fixed. Capture runs in evaluation mode
    with key-value caches off. The model is left as it was.

    Arguments:
        model: any module, or a program that `torch.export` made.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; inferred where left out.
        only_free: leave none but these sizes free. (The sizes of an exported program are what they are.)

    Raises:
        CaptureError: where no way of capturing works; it names the line at fault and what to try.
        InputError: where the example inputs do not fit the model.
    """
    if isinstance(model, ExportedProgram):
        return _from_exported(model, example_inputs)
    inputs = normalise(model, example_inputs)
    with untouched(model), eval_mode(model), caches_off(model):
        facts = probe(model, inputs.args, inputs.kwargs)
        with untouched(model), marked(model) as modules:  # what a forward leaves in a module has free sizes here
            program, how = _trace(model, inputs, only_free)
        dtype_notes = mark_dtypes(program, model, inputs)
    program.notes = (*_size_notes(program, how), *dtype_notes, *facts.lost)
    program.mode_modules = modules
    program.call = dataclasses.replace(program.call, accepted=_accepted(program.call, model))
    program.attention_dropout = facts.attention_dropout
    program.functional_dropout = facts.functional_dropout
    program.layerdrop = facts.layerdrop
    program.originals = dict(model.named_modules(remove_duplicate=False))
    return program


def _trace(model: torch.nn.Module, inputs: Inputs, only_free: frozenset[Place] | None) -> tuple[Program, str]:
    """The program, and how it was exported.

    A model that keeps something of its last call (a table for the length that it saw) ties the graph to that length
    where the example has the same: then a shorter example is tried.
    """

    def attempt(given: Inputs) -> tuple[Program, str]:
        exported, how = export(model, given, only_free=only_free)
        signature = inspect.signature(model.forward)
        return _to_program(exported, bind(model, given), signature, type(model).__name__), how

    found = attempt(inputs)
    if only_free is not None or not _tied(found[0]):
        return found
    try:
        other = attempt(shorten(inputs))
    except (CaptureError, InputError):
        return found
    return found if _tied(other[0]) else other


def _tied(program: Program) -> bool:
    """Whether a guard fixes a length: an expression of it, or the length of a matrix, equals a number.

    What divides a length leaves it free.
    """
    ndim = {leaf.name: leaf.ndim for leaf in program.call.leaves}
    for guard in program.guards:
        if re.fullmatch(r"[^%]*== \d+", guard.source) and any(
            dim == 1 and ndim[leaf] == 2 for leaf, dim in guard.sizes()
        ):
            return True
    return False


def export(
    model: torch.nn.Module, inputs: Inputs, attempts: int = 3, only_free: frozenset[Place] | None = None
) -> tuple[ExportedProgram, str]:
    """Non-strict, then strict, then with fixed sizes. Returns the program and how it was made."""
    widened = widen_batch(inputs) if rows_are_free(model, inputs, only_free) else inputs
    ways = [
        ("free sizes", widened, False, True),
        ("free sizes, strict", widened, True, True),
        ("fixed sizes", inputs, False, False),
    ]
    errors = []
    for how, given, strict, free in ways[:attempts]:
        try:
            with untouched(model), warnings.catch_warnings(), _tracing(model), named_keywords(model, given.kwargs):
                shapes = free_shapes(model, given, only_free) if free else None
                warnings.simplefilter("ignore")
                args, kwargs = _unmarked(given)
                with contextlib.nullcontext() if strict else compiled_when_run():
                    exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)
        except Exception as error:
            refuse_flex_attention(error, type(model).__name__)
            errors.append((how, error))
        else:
            return exported, how
    _check_inputs_run(model, inputs)
    raise capture_error(model, errors)


def _unmarked(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Aliases of the inputs, contiguous: export leaves marks on the tensors that it is given, and guards on strides."""

    def alias(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().contiguous().requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(torch.Tensor, alias, (inputs.args, dict(inputs.kwargs)))


def _check_inputs_run(model: torch.nn.Module, inputs: Inputs) -> None:
    """Where the model itself fails on the example inputs, they are at fault and not the capture."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    try:
        with torch.no_grad():
            model(*inputs.args, **inputs.kwargs)
    except Exception as error:
        line = line_at_fault(error)
        raise InputError(
            f"{type(model).__name__} itself fails on these example_inputs: {first_line(error)}"
            f"{f', at {line}' if line else ''}. "
            f"Pass inputs that it accepts; its forward takes {inspect.signature(model.forward)}."
        ) from error


@contextlib.contextmanager
def _tracing(model: torch.nn.Module) -> Iterator[None]:
    """Sizes are free from 0 on, so that a branch on a batch of 1 leaves a guard; nothing is said.

    Torch keeps the sizes of every result, to find them again at the next call of the operator. With free sizes that
    costs more than it saves unless many layers repeat: a third of the time of a model of two.
    """
    free_sizes = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    results_kept = torch._dynamo.config.patch(fake_tensor_cache_enabled=_most_repeated(model) >= _MANY_LAYERS)
    with quiet_export(), free_sizes, results_kept, idle_conversions(), numbers_remembered():
        yield


def _most_repeated(model: torch.nn.Module) -> int:
    """How many modules there are of the class that most of those with children have: the number of layers."""
    classes = Counter(type(module) for module in model.modules() if module._modules)
    return max(classes.values(), default=0)


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's own mode is put back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def caches_off(model: torch.nn.Module) -> Iterator[None]:
    """Hugging Face key-value caches switched off in the configurations of the model and its parts, then put back."""
    configurations: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False) is True:
            configurations[id(config)] = config
    for config in configurations.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configurations.values():
            config.use_cache = True


def _to_program(exported: ExportedProgram, bound: dict[str, Any], signature: inspect.Signature, name: str) -> Program:
    module = exported.module(check_guards=False)
    refuse_unrewritable(module, name)
    info = module.graph._codegen.pytree_info  # type: ignore[attr-defined]
    module.graph.set_codegen(fx.graph.CodeGen())
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    arguments = _arguments(bound)
    flat = [leaf for argument in arguments for leaf in argument.leaves]
    if len(flat) != len(placeholders):
        raise CaptureError(
            f"{name}: the capture has {len(placeholders)} inputs, but the call has {len(flat)} leaves. "
            "Pass example_inputs whose structure is made of tensors, tuples, lists and dicts."
        )
    tensors = []
    for node, leaf in zip(placeholders, flat, strict=True):
        if isinstance(leaf, Leaf):
            tensors.append((leaf, node.meta["val"]))
        else:
            node.replace_all_uses_with(leaf)
            module.graph.erase_node(node)
    conventions = CallingConvention(tuple(signature.parameters.values()), arguments, info.out_spec)
    persistent = set(exported.state_dict)
    non_persistent = frozenset(name for name, _ in module.named_buffers() if name not in persistent)
    module.recompile()
    return Program(
        module=module,
        call=conventions,
        guards=guarding.from_export(getattr(exported, "_guards_code", ()), tensors, exported.range_constraints, flat),
        name=name,
        non_persistent=non_persistent,
    )


def _arguments(bound: dict[str, Any]) -> tuple[Argument, ...]:
    arguments = []
    for name, value in bound.items():
        with_paths, spec = pytree.tree_flatten_with_path(value)
        leaves = tuple(
            Leaf(leaf_name(name, path), leaf.ndim, kind_of(leaf.dtype)) if isinstance(leaf, torch.Tensor) else leaf
            for path, leaf in with_paths
        )
        arguments.append(Argument(name, spec, leaves))
    return tuple(arguments)


def _accepted(call: CallingConvention, model: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
    """Values of arguments that were left out which say what was captured, by name.

    They are the default, and what a configuration (`model.config`) makes of None.
    """
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    settings = to_dict() if to_dict is not None else {}
    accepted = {name: (None, value) for name, value in settings.items() if isinstance(value, (bool, int, float, str))}
    if "use_cache" in accepted:
        accepted["use_cache"] = (None, False)
    for parameter in call.parameters:
        known = accepted.get(parameter.name, ()) if parameter.default is None else ()
        accepted[parameter.name] = (parameter.default, *known)
    return accepted


def _from_exported(exported: ExportedProgram, example_inputs: Any) -> Program:
    program = _to_program(exported, *arguments_of(exported, example_inputs), "the exported program")
    training = Note(
        "training",
        program.name,
        "what the model does only in training mode is not in an exported program",
        "pass the model itself to have dropout and normalisation in training mode",
    )
    program.notes = (*_size_notes(program, "exported"), training)
    return program


def _size_notes(program: Program, how: str) -> tuple[Note, ...]:
    """A note on every length or batch that the capture fixed."""
    notes = []
    for leaf, node in zip(program.call.leaves, program.graph.find_nodes(op="placeholder"), strict=True):
        sizes = [fixed_size(size) for size in node.meta["val"].shape]
        fixed = [dim for dim, size in enumerate(sizes) if size is not None]
        if how != "fixed sizes":
            fixed = [dim for dim in fixed if dim == 0 or (dim == 1 and leaf.ndim in (2, 3))]
        if fixed:
            dims = ", ".join(f"dimension {dim} = {sizes[dim]}" for dim in fixed)
            notes.append(Note("size", leaf.name, f"fixed at {dims}", "other sizes are refused by name"))
    return tuple(notes)
