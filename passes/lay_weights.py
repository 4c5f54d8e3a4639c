"""The share and residual passes of a plan, laid over a stack, and the record of what they did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from fxreuse.errors import PlanError
from fxreuse.plans.plan_weights import Residual, Share
from fxreuse.program import Program, get_attribute
from fxreuse.record import FitError, Note, SharedMatrix
from fxreuse.tree import drop, reads
from fxreuse.weights.block import Block
from fxreuse.weights.parts import Part, contiguous

from .add_residuals import add_residual
from .choose_residual_lowering import choose_lowering
from .fit_error import fit_error
from .group_fit import GroupFit, fit_group, mean_group, set_shared, with_effective, zero_group
from .share_weights import share_weights
from .weight_groups import Member, WeightGroup, check_readers, check_shapes, groups_at

#: Gives the example inputs as the placeholders of a program take them; None where they are not known.
Leaves = Callable[[], Sequence[torch.Tensor] | None]
_Matrices = dict[tuple[int, int, str], SharedMatrix]


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a pass did: a program, every matrix of the stack, parameters removed and added (path → numel).

    Matrices go by the names of the nodes that have their projections' results.
    """

    program: Program
    matrices: dict[str, tuple[SharedMatrix, ...]]
    removed: dict[str, int]
    added: dict[str, int]
    fits: tuple[FitError, ...] = ()
    notes: tuple[Note, ...] = ()


def lay_share(program: Program, block: Block, leaders: Sequence[int], step: Share) -> Weights:
    """Let the layers of each group share the weights of their projections. Architecture tier.

    Arguments:
        program: a normalised program; it is not changed.
        block: the block that the stack repeats.
        leaders: for every layer, the first layer of its group.
        step: the pass.

    Raises:
        PlanError: where the groups do not fit, or layers of a group differ in shape.
        UnsupportedError: where something else reads a weight.
    """
    owned = program.copy()
    groups = _checked(owned, block, leaders, step)
    if step.init == "mean":
        for group in groups:
            set_shared(owned, group, mean_group(owned, group, step.bias == "shared"))
    matrices = _describe(block.stack, groups, step.bias)
    share_weights(owned, groups, step.bias == "shared")
    return Weights(owned, _by_node(_names(groups), matrices), _finish(program, owned), {})


def lay_residual(
    program: Program,
    block: Block,
    leaders: Sequence[int],
    step: Residual,
    leaves: Leaves,
) -> Weights:
    """Let the layers of each group share the weights of their projections, and add a residual to each.

    Architecture tier.

    Arguments:
        program: a normalised program; it is not changed.
        block: the block that the stack repeats.
        leaders: for every layer, the first layer of its group.
        step: the pass; it has groups.
        leaves: gives the example inputs, for the error that a fit causes in the outputs.

    Raises:
        PlanError: where the groups or the rank do not fit, or layers of a group differ in shape.
        UnsupportedError: where something else reads a weight.
    """
    owned = program.copy()
    groups = _checked(owned, block, leaders, step)
    _check_rank(groups, step)
    shares_bias = step.bias == "shared"
    fit = step.init == "fit" and not _is_meta(owned, groups)
    if fit:
        fits = [fit_group(owned, group, step.rank, step.diagonal, shares_bias) for group in groups]
    else:
        fits = [zero_group(owned, group, step.rank, step.diagonal) for group in groups]
    errors = _errors(program, block.stack, owned, groups, fits, leaves()) if fit else ()
    for group, one in zip(groups, fits, strict=True):
        set_shared(owned, group, one)
    matrices = _describe(block.stack, groups, step.bias, fits)
    share_weights(owned, groups, shares_bias)
    groups = groups_at(owned, block, leaders)
    names = _names(groups)
    added = _add(owned, groups, fits, step, matrices)
    return Weights(owned, _by_node(names, matrices), _finish(program, owned), added, errors)


def add_to_shared(program: Program, groups: Sequence[WeightGroup], stack: str, step: Residual) -> Weights:
    """Add a residual to each layer of groups that share their weights already; it starts at zero. Exact tier.

    Arguments:
        program: a program that the caller owns; it is changed.
        groups: groups of its projections, each reading one weight.
        stack: the stack that they are of.
        step: the pass; it has no groups.

    Raises:
        PlanError: where the rank does not fit.
    """
    _check_rank(groups, step)
    fits = [zero_group(program, group, step.rank, step.diagonal) for group in groups]
    names, matrices = _names(groups), _describe(stack, groups, None)
    added = _add(program, groups, fits, step, matrices)
    _finish(program, program)
    notes = []
    if step.init == "fit":
        text = "its layers share their weights already: residuals start at zero, and the function stays as it is"
        remedy = "to fit residuals to trained weights, share in the same pass: residual k=3 r=16"
        notes.append(Note("fit", stack, text, remedy))
    return Weights(program, _by_node(names, matrices), {}, added, notes=tuple(notes))


def _checked(program: Program, block: Block, leaders: Sequence[int], step: Share | Residual) -> list[WeightGroup]:
    """The groups of a stack, after all checks that do not depend on values."""
    if len(set(leaders)) == len(leaders):
        count = len(leaders)
        hint = f"choose k from 2 to {count}" if count > 1 else "it has one layer"
        raise PlanError(
            f"plan {str(step)!r} leaves each of the {count} layers of stack {block.stack} in a group of its own, so "
            f"there is nothing to share; {hint}."
        )
    groups = groups_at(program, block, leaders)
    if not any(len(group.members) > 1 for group in groups):
        raise PlanError(
            f"plan {str(step)!r}: there is nothing to share in stack {block.stack}: its layers, such as "
            f"{block.layers[0]}, have no projections in common."
        )
    if all(member.projection.weight == group.owner.projection.weight for group in groups for member in group.members):
        raise PlanError(
            f"plan {str(step)!r}: there is nothing to share in stack {block.stack}: its layers read the same weights "
            f"already, such as {groups[0].owner.projection.weight}; write 'residual r=16' to add residuals to them."
        )
    check_shapes(groups)
    check_readers(program, groups)
    return groups


def _check_rank(groups: Sequence[WeightGroup], step: Residual) -> None:
    """The rank fits one of the matrices at least; of smaller ones, it is full."""
    found = [
        (min(member.shape(part)), member, part) for group in groups for member in group.members for part in member.parts
    ]
    full, member, part = max(found, key=lambda one: one[0])
    if step.rank > full:
        inputs, outputs = member.shape(part)
        raise PlanError(
            f"r={step.rank} is more than full rank: the largest matrix of {member.path} is {member.weight} with "
            f"{inputs}×{outputs}; choose r from 1 to {full}."
        )


def _is_meta(program: Program, groups: Sequence[WeightGroup]) -> bool:
    return any(get_attribute(program.module, group.owner.projection.weight).is_meta for group in groups)


def _errors(
    program: Program,
    stack: str,
    owned: Program,
    groups: Sequence[WeightGroup],
    fits: Sequence[GroupFit],
    leaves: Sequence[torch.Tensor] | None,
) -> tuple[FitError, ...]:
    """The error of the outputs; nothing where the example inputs are not known."""
    if leaves is None:
        return ()
    weights, biases = with_effective(owned, groups, fits)
    return (fit_error(program, stack, weights, biases, leaves),)


def _describe(
    stack: str, groups: Sequence[WeightGroup], bias: str | None, fits: Sequence[GroupFit] | None = None
) -> _Matrices:
    """Every matrix by its group, layer and role, as it is before residuals are added.

    ``bias`` is ``"shared"`` or ``"own"`` where layers are to begin to share, None where they share what they read now.
    """
    found: _Matrices = {}
    places: dict[str, int] = {}
    for number, group in enumerate(groups):
        place = places.setdefault(_place(group.members[0]), len(places))
        for member in group.members:
            for part in member.parts:
                fit = None if fits is None else fits[number]
                found[number, member.layer, part.role] = _matrix(stack, place, group, member, part, bias, fit)
    return found


def _names(groups: Sequence[WeightGroup]) -> dict[tuple[int, int], str]:
    """By group and layer, the name of the result's node: a sum that is made of it takes that over."""
    return {
        (number, member.layer): member.projection.result.name
        for number, group in enumerate(groups)
        for member in group.members
    }


def _by_node(names: dict[tuple[int, int], str], matrices: _Matrices) -> dict[str, tuple[SharedMatrix, ...]]:
    found: dict[str, tuple[SharedMatrix, ...]] = {}
    for (number, layer, _), one in matrices.items():
        name = names[number, layer]
        found[name] = (*found.get(name, ()), one)
    return found


def _place(member: Member) -> str:
    """What the weights at one place have in common: their way inside of the layer."""
    return member.weight.removeprefix(member.path.partition("@")[0])


def _matrix(
    stack: str, place: int, group: WeightGroup, member: Member, part: Part, bias: str | None, fit: GroupFit | None
) -> SharedMatrix:
    own = group.owner.part(part.role)
    assert own is not None
    kept = member.projection.bias if bias is None else member.bias
    shares = bias == "shared" and member.projection.bias is not None
    return SharedMatrix(
        weight=member.weight,
        role=part.role,
        stack=stack,
        layer=member.layer,
        place=place,
        group=group.first,
        shape=member.shape(part),
        shared=group.owner.projection.weight,
        axis=member.projection.axis,
        rows=_compact(part.rows),
        shared_rows=_compact(group.owner.projection.rows[own.features]),
        bias=member.bias,
        shared_bias=group.owner.projection.bias if shares else kept,
        error=None if fit is None else fit.errors.get((member.layer, part.role)),
        bias_error=None if fit is None else fit.bias_errors.get(member.layer),
    )


def _compact(rows: torch.Tensor) -> Sequence[int]:
    span = contiguous(rows)
    return tuple(rows.tolist()) if span is None else range(*span)


def _add(
    program: Program, groups: Sequence[WeightGroup], fits: Sequence[GroupFit], step: Residual, matrices: _Matrices
) -> dict[str, int]:
    """Add the residuals to a program, and what was done to the record. Returns the parameters added."""
    added: dict[str, int] = {}
    for number, (group, fit) in enumerate(zip(groups, fits, strict=True)):
        for member in group.members:
            factors = [fit.factors[member.layer, part.role] for part in member.parts]
            lowering, reason = step.lowering, "as the plan says"
            if lowering == "auto":
                lowering, reason = choose_lowering(member.projection, factors[0].a.shape[1], step.diagonal)
            made = add_residual(program, member, factors, lowering)
            for part, residual, one in zip(member.parts, made, factors, strict=True):
                key = number, member.layer, part.role
                matrices[key] = dataclasses.replace(
                    matrices[key], residual=residual.paths, rank=one.a.shape[1], lowering=lowering, reason=reason
                )
                sizes = {"A": one.a.numel(), "B": one.b.numel(), "D": 0 if one.d is None else one.d.numel()}
                added |= {path: sizes[letter] for letter, path in residual.paths.items()}
    return added


def _finish(before: Program, program: Program) -> dict[str, int]:
    """Take out what nobody reads any more; returns the parameters among it."""
    earlier, later = reads(before), reads(program)
    gone = earlier.keys() - later.keys()
    drop(program, set(gone))
    program.module.recompile()
    program.check()
    return {path: earlier[path].numel() for path in sorted(gone) if isinstance(earlier[path], torch.nn.Parameter)}
