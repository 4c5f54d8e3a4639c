"""Another number of heads for some sites: the same parameters, split anew (``4(H8)x2``)."""

from __future__ import annotations

from collections.abc import Sequence

from fxreuse.attention import AttentionSite
from fxreuse.errors import PlanError, UnsupportedError
from fxreuse.finding.find import find
from fxreuse.finding.flow import Flow
from fxreuse.program import Program

from .head_axes import Split
from .head_labels import Labels
from .head_scale import rescale
from .head_sizes import apply_labels


def split_heads(program: Program, sites: Sequence[AttentionSite], heads: int) -> Program:
    """Split queries, keys, values and outputs of some sites into another number of heads. Architecture tier.

    Every parameter stays, as if the model's own class had been built with that many heads and had loaded the same
    state dict; a parameter of shape heads × channels (a Conformer's ``u`` and ``v``) is brought into its new shape.
    The scale of the scores becomes 1/√ of the new width of a head.

    Which axis of which value has heads or channels is followed through the graph, from the operands of each attention
    back to the values whose shape does not depend on it, and from there forward; every size in between that was made of
    heads or channels is written anew, and all shapes are computed again. Sound because nothing is left that has the
    old sizes: a value that cannot be followed, or that has an axis of heads and none of channels, is refused.

    Arguments:
        program: a normalised program, before reuse; it is not changed.
        sites: sites of this program.
        heads: the number of heads that they shall have.

    Returns:
        A program in which the same nodes have the same names. Find its sites again before using them.

    Raises:
        PlanError: where the heads do not divide the width.
        UnsupportedError: where a parameter has heads but no channels (tables of biases, ALiBi), or channels but no
            heads (norms of queries and keys), where rotary embeddings fix the width of a head, and where a size
            cannot be followed; node and line are named.
    """
    wanted = [site for site in sites if site.heads != heads]
    if not wanted:
        return program
    for site in wanted:
        _check(site, heads)
    program = program.copy()
    chosen = {(site.path, site.order) for site in wanted}
    kept = {site.path for site in find(program) if (site.path, site.order) not in chosen and site.heads != heads}
    labels = Labels(program, Flow(program), kept)
    for site in wanted:
        labels.add(site, Split(site.heads, heads))
    labels.follow()
    for site in wanted:
        rescale(program, site, labels, heads)
    apply_labels(program, labels)
    program.module.recompile()
    program.check()
    _check_result(program, wanted, sites, heads)
    return program


def _check(site: AttentionSite, heads: int) -> None:
    for name, width in (("queries", site.head_dim), ("values", site.value_dim)):
        if heads < 1 or site.heads * width % heads:
            raise PlanError(
                f"{site} cannot have {heads} heads: its {name} have {site.heads} × {width} = {site.heads * width} "
                f"channels, which {heads} does not divide."
            )
    if site.kv_heads * heads % site.heads:
        raise PlanError(
            f"{site} cannot have {heads} heads: {site.heads} of queries share {site.kv_heads} of keys and values, so "
            f"that {heads} would share {site.kv_heads * heads / site.heads:g}."
        )


def _check_result(
    program: Program, wanted: Sequence[AttentionSite], sites: Sequence[AttentionSite], heads: int
) -> None:
    """Recognition, which knows nothing of the rewrite, has to see the new heads, and the same of everything else."""
    found = {(site.path, site.order): site for site in find(program)}
    for site in wanted:
        after = found.get((site.path, site.order))
        before = [str(size) for size in site.map_shape]
        before[1] = str(heads)
        if after is None or [str(size) for size in after.map_shape] != before:
            shape = "no map" if after is None else "×".join(str(size) for size in after.map_shape)
            raise UnsupportedError(
                f"{site} cannot be split into {heads} heads: its map is {shape} then, and not {'×'.join(before)}."
            )
