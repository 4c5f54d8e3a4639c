"""Groups of corresponding projections: what share and residual work on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from fxreuse.attention import AttentionSites
from fxreuse.emission.outline import layer_nodes
from fxreuse.errors import PlanError, UnsupportedError
from fxreuse.layouts.projections import Projection, read_projection, value_readers
from fxreuse.program import Program
from fxreuse.weights.block import Block, projections_of
from fxreuse.weights.parts import Part, operands_of, parts_of


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """The projection of one layer of a group, and its matrices.

    ``layer`` is the number of the layer and ``path`` the module call that it is. ``weight`` and ``bias`` are the paths
    that the layer's own parameters have or had.
    """

    layer: int
    path: str
    weight: str
    bias: str | None
    projection: Projection
    parts: tuple[Part, ...]

    def shape(self, part: Part) -> tuple[int, int]:
        """Inputs and outputs of one of its matrices."""
        return len(self.projection.columns), len(part.features)

    def part(self, role: str) -> Part | None:
        """Its matrix of that role."""
        return next((part for part in self.parts if part.role == role), None)


@dataclasses.dataclass(frozen=True, eq=False)
class WeightGroup:
    """Projections at one place of a group of layers. The owner's parameters are the ones that they share.

    ``first`` is the number of the group's first layer.
    """

    first: int
    members: tuple[Member, ...]

    @property
    def owner(self) -> Member:
        """The first member with the most matrices (queries, keys and values, where others have values alone)."""
        return max(self.members, key=lambda member: len(member.parts))


def groups_at(program: Program, block: Block, leaders: Sequence[int]) -> list[WeightGroup]:
    """The groups at every place of a block; what an earlier pass took out of a layer is in none.

    Arguments:
        program: the program as it is now.
        block: the block as it was found before any pass.
        leaders: for every layer, the first layer of its group.
    """
    known = {node.name: node for node in program.graph.nodes}
    found = []
    for place in block.places:
        by_first: dict[int, list[Member]] = {}
        for layer, (name, parts) in enumerate(zip(place.nodes, place.parts, strict=True)):
            projection = read_projection(program, known[name]) if name in known else None
            if projection is not None:
                own = place.weights[layer], place.biases[layer]
                member = Member(layer, block.layers[layer], *own, projection, _remaining(parts, projection))
                by_first.setdefault(leaders[layer], []).append(member)
        found += [WeightGroup(first, tuple(members)) for first, members in by_first.items()]
    return found


def _remaining(parts: tuple[Part, ...], projection: Projection) -> tuple[Part, ...]:
    """The matrices that a projection still has: of a fused one that was cut, reuse leaves the values."""
    width = len(projection.rows)
    if width == sum(len(part.features) for part in parts):
        return parts
    left = parts[0] if len(parts) == 1 else next((part for part in parts if part.role == "value"), parts[-1])
    return (dataclasses.replace(left, features=torch.arange(width)),)


def groups_that_share(
    program: Program, sites: AttentionSites, stack: str, convolutions: bool = False
) -> list[WeightGroup]:
    """The projections of a stack's layers, in groups that read one parameter already.

    ``convolutions`` says whether those over one position are among them.

    Raises:
        PlanError: where no two layers share any.
    """
    layers = list(dict.fromkeys(site.layer_path for site in sites.stacks[stack]))
    nodes = layer_nodes(program.graph, layers)
    groups: dict[tuple[int, str], list[Member]] = {}
    for number, layer in enumerate(layers):
        own = [site for site in sites if site.layer_path == layer]
        operands = operands_of(program, own)
        for projection in projections_of(program, nodes[layer], own, convolutions):
            key = id(_parameter(program, projection)), str(projection.rows.tolist())
            members = groups.setdefault(key, [])
            owner = members[0].path if members else layer
            weight = _moved(projection.weight, owner, layer)
            bias = projection.bias
            if bias is not None and bias.startswith(f"{owner.partition('@')[0]}."):
                bias = _moved(bias, owner, layer)  # one that the layer keeps for itself is where it is
            members.append(Member(number, layer, weight, bias, projection, parts_of(program, projection, operands)))
    found = [WeightGroup(members[0].layer, tuple(members)) for members in groups.values()]
    if not any(len({member.path for member in group.members}) > 1 for group in found):
        raise PlanError(
            f"the {len(layers)} layers of stack {stack} share no weights, and a residual without k= is added to "
            "weights that are shared; write 'residual k=3 r=16', or share first: 'share k=3 | residual r=16'."
        )
    return found


def _moved(path: str, owner: str, layer: str) -> str:
    """The path that a layer's weight would have beside the owner's: the same way inside of the layer.

    >>> _moved("layers.0.fc.weight", "layers.0", "layers.2"), _moved("a.fc.weight", "a", "a@1")
    ('layers.2.fc.weight', 'a.fc.weight')
    """
    inside = path.removeprefix(owner.partition("@")[0] + ".")
    return f"{layer.partition('@')[0]}.{inside}"


def _parameter(program: Program, projection: Projection) -> torch.Tensor:
    owner, _, name = projection.weight.rpartition(".")
    return getattr(program.module.get_submodule(owner), name)


def check_shapes(groups: Sequence[WeightGroup]) -> None:
    """Projections of a group have matrices of one shape, and all have a bias or none has.

    Raises:
        PlanError: they have not; the layers, weights and shapes are named.
    """
    for group in groups:
        owner = group.owner
        for member in group.members:
            for part in member.parts:
                other = owner.part(part.role)
                shape, expected = member.shape(part), None if other is None else owner.shape(other)
                if shape != expected:
                    raise PlanError(
                        f"{owner.path} and {member.path} are in one group, but {_named(owner, other, part)} and "
                        f"{_named(member, part, part)} differ in shape; layers that share weights are of one size."
                    )
            if bool(owner.projection.biases) != bool(member.projection.biases):
                with_bias, without = (owner, member) if owner.projection.biases else (member, owner)
                raise PlanError(
                    f"{owner.path} and {member.path} are in one group, but {with_bias.projection.weight} has a bias "
                    f"and {without.projection.weight} has none."
                )


def _named(member: Member, part: Part | None, wanted: Part) -> str:
    if part is None:
        return f"{member.projection.weight} (no {wanted.role or 'such matrix'})"
    inputs, outputs = member.shape(part)
    return f"{member.projection.weight}{f' ({part.role})' if part.role else ''} of {inputs}×{outputs}"


def check_readers(program: Program, groups: Sequence[WeightGroup]) -> None:
    """Nothing but the projections of the groups reads their parameters.

    Raises:
        UnsupportedError: something does; it is named.
    """
    own: set[fx.Node] = set()
    for group in groups:
        for member in group.members:
            own |= {member.projection.node, member.projection.result}
            own |= {*member.projection.weights, *member.projection.biases}
    paths = {str(node.target) for node in own if node.op == "get_attr"}
    for node in program.graph.find_nodes(op="get_attr"):
        if str(node.target) not in paths:
            continue
        readers = (user for user in value_readers(node) if isinstance(user.meta.get("val"), torch.Tensor))
        stranger = next((user for user in readers if user not in own), None)
        if stranger is not None:
            raise UnsupportedError(
                f"{node.target} cannot be shared between layers: {stranger.name} reads it as well, which is no "
                "projection at a place that the layers have in common."
            )
