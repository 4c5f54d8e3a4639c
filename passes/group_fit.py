"""The values that a group of projections gets: shared weights and biases, and residuals, fitted or starting at zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from fxreuse.layouts.projections import set_parameter
from fxreuse.program import Program, get_attribute
from fxreuse.weights.matrices import read_matrix, write_matrix
from fxreuse.weights.parts import Part

from .fit_residuals import Factors, fit_residuals, start_at_zero
from .parameters import at_top
from .weight_groups import Member, WeightGroup

Key = tuple[int, str]


@dataclasses.dataclass(frozen=True)
class GroupFit:
    """The values of a group. Matrices have the key (layer, role), biases their layer.

    ``shared`` has the shared matrix for each of the owner's; it is empty where the owner's weight stays as it is.
    ``bias`` is the shared bias; None where it stays as it is, or there is none.
    """

    factors: Mapping[Key, Factors]
    shared: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    errors: Mapping[Key, float] = dataclasses.field(default_factory=dict)
    bias: torch.Tensor | None = None
    bias_errors: Mapping[int, float] = dataclasses.field(default_factory=dict)


def fit_group(program: Program, group: WeightGroup, rank: int, diagonal: bool, bias: bool) -> GroupFit:
    """Fit shared matrices and residuals to the weights of a group, and with ``bias`` a shared bias to its biases."""
    shared: dict[str, torch.Tensor] = {}
    factors: dict[Key, Factors] = {}
    errors: dict[Key, float] = {}
    for own in group.owner.parts:
        found = [(member, part) for member in group.members if (part := member.part(own.role)) is not None]
        weights = [matrix(program, member, part) for member, part in found]
        fitted = fit_residuals(weights, min(rank, *weights[0].shape), diagonal)
        shared[own.role] = fitted.shared
        for (member, _), one, error in zip(found, fitted.factors, fitted.errors, strict=True):
            factors[member.layer, own.role] = one.to(weights[0].dtype)
            errors[member.layer, own.role] = error
    mean = mean_bias(program, group) if bias else None
    return GroupFit(factors, shared, errors, mean, _bias_errors(program, group, mean))


def zero_group(program: Program, group: WeightGroup, rank: int, diagonal: bool) -> GroupFit:
    """Residuals that are zero, for weights that stay as they are."""
    like = get_attribute(program.module, group.owner.projection.weight).detach()
    return GroupFit(
        {
            (member.layer, part.role): start_at_zero(
                member.shape(part), min(rank, *member.shape(part)), diagonal, like=like
            )
            for member in group.members
            for part in member.parts
        }
    )


def mean_group(program: Program, group: WeightGroup, bias: bool) -> GroupFit:
    """The means of the group's matrices, and with ``bias`` of its biases."""
    shared = {}
    for own in group.owner.parts:
        parts = [(member, member.part(own.role)) for member in group.members]
        weights = [matrix(program, member, part) for member, part in parts if part is not None]
        shared[own.role] = torch.stack([weight.double() for weight in weights]).mean(0)
    return GroupFit({}, shared, bias=mean_bias(program, group) if bias else None)


def set_shared(program: Program, group: WeightGroup, fit: GroupFit) -> None:
    """Put shared values in the place of the owner's parameters, in place; the original's own stay as they are."""
    owner = group.owner
    if fit.shared:
        node = at_top(program, owner.projection.weight)
        weight = get_attribute(program.module, owner.projection.weight).detach().clone()
        for part in owner.parts:
            write_matrix(weight, owner.projection, part.features, fit.shared[part.role])
        set_parameter(program, node, weight)
    if fit.bias is not None and owner.projection.bias is not None:
        node = at_top(program, owner.projection.bias)
        bias = get_attribute(program.module, owner.projection.bias).detach().clone()
        bias[owner.projection.rows.to(bias.device)] = fit.bias.to(bias.dtype)
        set_parameter(program, node, bias)


def matrix(program: Program, member: Member, part: Part) -> torch.Tensor:
    """The values of one matrix of a layer, inputs × outputs."""
    return read_matrix(get_attribute(program.module, member.projection.weight), member.projection, part.features)


def bias_of(program: Program, member: Member, features: torch.Tensor) -> torch.Tensor | None:
    """The biases of some output features of a layer's projection; None where it has none."""
    if member.projection.bias is None:
        return None
    bias = get_attribute(program.module, member.projection.bias).detach()
    return bias.index_select(0, member.projection.rows[features].to(bias.device))


def mean_bias(program: Program, group: WeightGroup) -> torch.Tensor | None:
    """The mean bias of a group, in the order of the owner's output features; None where there is none."""
    owner = group.owner
    if owner.projection.bias is None:
        return None
    like = get_attribute(program.module, owner.projection.bias)
    mean = torch.empty(len(owner.projection.rows), dtype=torch.float64, device=like.device)
    for own in owner.parts:
        parts = [(member, member.part(own.role)) for member in group.members]
        found = [bias_of(program, member, part.features) for member, part in parts if part is not None]
        mean[own.features] = torch.stack([bias.double() for bias in found if bias is not None]).mean(0)
    return mean


def shared_bias_of(group: WeightGroup, member: Member, mean: torch.Tensor) -> torch.Tensor:
    """What a member reads of the group's shared bias, in the order of its own output features."""
    found = torch.empty(len(member.projection.rows), dtype=mean.dtype, device=mean.device)
    for part in member.parts:
        own = group.owner.part(part.role)
        assert own is not None
        found[part.features] = mean[own.features]
    return found


def _bias_errors(program: Program, group: WeightGroup, mean: torch.Tensor | None) -> dict[int, float]:
    if mean is None or mean.is_meta:
        return {}
    errors = {}
    for member in group.members:
        bias = bias_of(program, member, torch.arange(len(member.projection.rows)))
        assert bias is not None
        off, size = float((bias - shared_bias_of(group, member, mean)).norm()), float(bias.norm())
        errors[member.layer] = off / size if size else off
    return errors


def with_effective(
    program: Program, groups: Sequence[WeightGroup], fits: Sequence[GroupFit]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What each layer's own weights and biases would have to be to compute the same, by path."""
    weights: dict[str, torch.Tensor] = {}
    biases: dict[str, torch.Tensor] = {}
    for group, fit in zip(groups, fits, strict=True):
        for member in group.members:
            path, bias = member.projection.weight, member.projection.bias
            for part in member.parts:
                if path not in weights:
                    weights[path] = get_attribute(program.module, path).detach().clone()
                made = fit.shared[part.role] + fit.factors[member.layer, part.role].dense()
                write_matrix(weights[path], member.projection, part.features, made)
            if bias is not None and fit.bias is not None:
                if bias not in biases:
                    biases[bias] = get_attribute(program.module, bias).detach().clone()
                shared = shared_bias_of(group, member, fit.bias).to(biases[bias].dtype)
                biases[bias][member.projection.rows.to(shared.device)] = shared
    return weights, biases
