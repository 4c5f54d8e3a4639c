"""`fxreuse.apply` and its readers: the front door."""

from __future__ import annotations

import copy as copying
from typing import Any

import torch
from torch.export import ExportedProgram

from .attention import AttentionSites
from .emission.emit import emit
from .emission.rewritten import Rewritten
from .errors import FxReuseError, PlanError, UnsupportedError
from .finding.find import find
from .frontend.inputs import check_model
from .frontend.leaves import example_leaves
from .frontend.lengths import bound_lengths
from .frontend.load import load_program
from .frontend.target import captured_inputs, replace_submodule
from .frontend.warn import warn_of_losses
from .lay_plan import lay_plan
from .passes.fold_modules import fold_modules
from .plans.plan import Plan, Reuse
from .plans.plan_fiak import Fiak
from .priors.blueprint import Blueprint
from .program import Program
from .record import Record
from .weigh import weigh, with_priors


def apply(
    model: torch.nn.Module | ExportedProgram,
    plan: str | Plan,
    example_inputs: Any = None,
    *,
    target: str | None = None,
    copy: bool = False,
) -> torch.nn.Module:
    """Rewrite a model by a plan: in each group of layers one attention map, or one set of weights, serves all.

    Arguments:
        model: any Transformer, or a `torch.export.ExportedProgram` of one. It is not changed (but see ``target``).
        plan: such as ``"4x4"``: four layers a group, four groups. See `Plan`.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; inferred where left
            out. Batch and lengths stay free.
        target: the path of a submodule: only it is captured and replaced, in place, inside ``model``, which is
            returned. ``example_inputs`` are the whole model's.
        copy: give the result parameters of its own. Without it they are shared with ``model``, so that training or
            converting one changes the other.

    Returns:
        A module that is called as the original is and gives the same class of output, with the original's parameter
        names. `describe` tells what was done.

    Raises:
        PlanError: where the plan does not fit.
        CaptureError: where the model cannot be captured.
        UnsupportedError: where there is no attention, or the rewrite would not be sound.
        InputError: where example inputs are missing or wrong.

    >>> import torch, fxreuse
    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    >>> small = fxreuse.apply(model, "2x2", torch.randn(2, 5, 16))
    >>> small(torch.randn(3, 7, 16)).shape
    torch.Size([3, 7, 16])
    >>> [decision.action for decision in fxreuse.describe(small).decisions]
    ['lead', 'follow', 'lead', 'follow']
    """
    parsed = Plan.of(plan)
    if target is not None:
        inner, inputs = captured_inputs(model, target, example_inputs)
        assert isinstance(model, torch.nn.Module)
        return replace_submodule(model, target, _apply(inner, parsed, inputs, copy))
    return _apply(model, parsed, example_inputs, copy)


def _apply(model: torch.nn.Module | ExportedProgram, plan: Plan, example_inputs: Any, copy: bool) -> Rewritten:
    program = load_program(model, example_inputs)
    rewritten = rewrite(program, find(program), plan, model, example_inputs)
    warn_of_losses(rewritten.record)
    return copying.deepcopy(rewritten) if copy else rewritten


def rewrite(
    program: Program,
    sites: AttentionSites,
    plan: Plan,
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Any = None,
) -> Rewritten:
    """What `apply` makes of a captured program whose attentions were found.

    ``model`` says which modes it has; it and the example inputs are run where weights are fitted to it.
    """
    if not len(sites):
        reasons = "; ".join(f"{r.path or 'the model'}: {r.reason}" for r in sites.rejected[:5])
        raise UnsupportedError(
            f"{program.name} has no attention that could be rewritten. "
            + (f"Softmaxes that were looked at: {reasons}." if reasons else "Its graph has no softmax at all.")
        )
    _check_again(model, plan)
    program, sites = bound_lengths(model, example_inputs, program, sites, plan)
    weighed = weigh(program, sites, plan)
    call = program.call
    program, record = lay_plan(
        weighed.program, sites, plan, lambda: example_leaves(model, call, example_inputs), captured=program
    )
    modes = {"": False} if isinstance(model, ExportedProgram) else {p: m.training for p, m in model.named_modules()}
    layer_paths = tuple(site.layer_path for site in sites if site.layer_path)
    rewritten = emit(fold_modules(program), with_priors(record, weighed), layer_paths, modes)
    if weighed.priors:
        rewritten.blueprint = Blueprint.of(program, layer_paths, weighed.priors)
    return rewritten


def _check_again(model: torch.nn.Module | ExportedProgram, plan: Plan) -> None:
    """What an earlier plan made of a model may leave no layers that correspond.

    Raises:
        PlanError: the plan shares weights in a model whose layers differ by what an earlier plan did.
    """
    if isinstance(model, ExportedProgram) or all(isinstance(step, (Reuse, Fiak)) for step in plan.passes):
        return
    for module in model.modules():
        if not isinstance(module, Rewritten):
            continue
        followers = any(decision.action == "follow" for decision in module.record.decisions)
        residuals = any(matrix.residual for matrix in module.record.matrices)
        if followers or residuals:
            raise PlanError(
                f"plan {str(plan)!r}: {module.name} was rewritten by {module.record.plan!r} before, so that its layers "
                f"{'have residuals' if residuals else 'are not alike'}; lay both in one plan over the original, as in "
                f"'{module.record.plan} | {plan}'."
            )


def find_attention(
    model: torch.nn.Module | ExportedProgram, example_inputs: Any = None, *, target: str | None = None
) -> AttentionSites:
    """Find every attention of a model by data flow.

    Arguments are those of `apply`; nothing is changed.

    Returns:
        The sites in the order of execution; printing gives a table, ``.stacks`` groups them, ``.rejected`` has the
        softmaxes that are not attention, with reasons.

    >>> import torch, fxreuse
    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    >>> [str(site) for site in fxreuse.find_attention(model, torch.randn(2, 5, 16))]
    ['layers.0.self_attn', 'layers.1.self_attn']
    """
    if target is not None:
        model, example_inputs = captured_inputs(model, target, example_inputs)
    return find(load_program(model, example_inputs))


def describe(rewritten: torch.nn.Module) -> Record:
    """The record of a rewritten model: plan, stacks, one decision per site, parameters removed and added, notes.

    A model in which a submodule was replaced (``target=``) is described by that submodule.

    Raises:
        FxReuseError: where the module is not one that `apply` made.
    """
    check_model(rewritten, "describe")
    found = [module for module in rewritten.modules() if isinstance(module, Rewritten)]
    if not found:
        raise FxReuseError(
            f"{type(rewritten).__name__} was not made by fxreuse.apply, so there is no record to describe. "
            "Pass what apply returned."
        )
    return found[0].record
