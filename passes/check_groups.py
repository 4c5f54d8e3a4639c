"""Whether the layers of a group can share a map at all: same shape, same mask, same layout, and a value to read."""

from __future__ import annotations

from collections.abc import Sequence

from fxreuse.attention import AttentionSite
from fxreuse.errors import PlanError, UnsupportedError
from fxreuse.program import Program

from .functional import may_alias


def check_groups(program: Program, sites: Sequence[AttentionSite], leaders: Sequence[int]) -> None:
    """Refuse groups whose maps are not one thing.

    Arguments:
        program: the program that the sites are in.
        sites: the sites of one stack, by layer.
        leaders: for every layer, the layer whose map it is to use.

    Raises:
        PlanError: where a group's maps differ in shape, in mask, or in the tokens that they go over.
        UnsupportedError: where they are laid out differently, are written into, or are of another kind.
    """
    for layer, leader in enumerate(leaders):
        if layer == leader:
            continue
        follower, source = sites[layer], sites[leader]
        shapes = [[str(size) for size in site.map_shape] for site in (source, follower)]
        if shapes[0] != shapes[1]:
            raise PlanError(
                f"{follower} (layer {layer}) cannot use the map of {source} (layer {leader}): their maps differ in "
                f"shape, {'×'.join(shapes[1])} against {'×'.join(shapes[0])} (batch×heads×queries×keys). "
                "Choose groups within layers whose maps have one shape."
            )
        if source.mask_key != follower.mask_key:
            raise PlanError(
                f"{follower} (layer {layer}) cannot use the map of {source} (layer {leader}): they are masked "
                f"differently, {follower.mask!r} against {source.mask!r}. Layers by mask: {_by_mask(sites)}. "
                "Choose groups within layers of one mask, with leaders=… if they alternate."
            )
        if source.tokens.differ(follower.tokens):
            raise PlanError(
                f"{follower} (layer {layer}) cannot use the map of {source} (layer {leader}): they attend over "
                f"different tokens, {follower.tokens} against {source.tokens}. "
                "Choose groups within layers of the same tokens, with leaders=… if they alternate."
            )
        layouts = [_layout(program, site) for site in (source, follower)]
        if layouts[0] != layouts[1]:
            raise UnsupportedError(
                f"{follower} (layer {layer}) cannot use the map of {source} (layer {leader}): the model lays them out "
                f"differently, {layouts[1]} against {layouts[0]}. Choose groups within layers of one layout."
            )
        for site in (source, follower):
            _check_not_written(program, site)
        if source.kind != follower.kind:
            raise UnsupportedError(f"{follower} is {follower.kind} attention, but {source} is {source.kind} attention.")


def _layout(program: Program, site: AttentionSite) -> str:
    """The axes of a site's map in memory, and which of them is the softmax's."""
    if site.fused:
        return "×".join(str(size) for size in site.map_shape) + ", softmax over axis -1"
    shape = program.node(site.nodes.map).meta["val"].shape
    return "×".join(str(size) for size in shape) + f", softmax over axis {site.nodes.axis}"


def _check_not_written(program: Program, site: AttentionSite) -> None:
    """A map that the model changes in place is not a value that others could read."""
    if site.fused:
        return
    aliases = [program.node(site.nodes.map)]
    for alias in aliases:
        for user in alias.users:
            schema = getattr(user.target, "_schema", None)
            if schema is None or user.args[:1] != (alias,):
                continue
            if schema.is_mutable:
                raise UnsupportedError(
                    f"{site}: the model writes into its attention map in place ({user.name}: {user.target}), so other "
                    "layers cannot share it. Write the change as a new tensor."
                )
            if may_alias(user) and user not in aliases:
                aliases.append(user)


def _by_mask(sites: Sequence[AttentionSite]) -> str:
    kinds: dict[str, list[str]] = {}
    for site in sites:
        kinds.setdefault(site.mask_key, []).append(str(site.layer))
    return " | ".join(",".join(layers) for layers in kinds.values())
