"""Cut fused projections: where only the values of a QKV projection are still read, only their rows stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from fxreuse.attention import AttentionSite
from fxreuse.layouts.arrangement import Arrangement, Layer, arrange, fits
from fxreuse.layouts.layout import indices_of, push
from fxreuse.layouts.projections import Projection, hints, is_move, read_projection, resize, take_place
from fxreuse.nodes import inserting_before, remove_dead
from fxreuse.program import Program, get_attribute, module_stack


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Where the kept rows of a projection go: the first node that has just them, and its arrangement.

    ``between`` are the nodes that are laid out anew or away.
    """

    node: fx.Node
    arrangement: Arrangement
    between: frozenset[fx.Node]


def cut_projections(program: Program, followers: Sequence[AttentionSite]) -> dict[str, int]:
    """Cut the fused projections of followers to the rows that are still read. Works on the program in place.

    Which weight row feeds which channel is read off the graph, as `layout` does it: indices of tokens and rows
    are pushed through the views, permutations and splits behind the projection. Sound because a row that reaches no
    reader changes nothing, and because a layout that mixes tokens and rows is left alone. The name of the node that is
    laid out anew stays.

    Returns the parameters that became smaller, path → number of elements removed.
    """
    removed: dict[str, int] = {}
    layers = {site.layer_path for site in followers}
    for node in list(program.graph.nodes):
        if layers.isdisjoint(module_stack(node)):
            continue
        projection = read_projection(program, node)
        if projection is not None and projection.read_here_only() and _has_known_sizes(projection.result):
            removed |= _cut(program, projection)
    remove_dead(program.graph)
    return removed


def _has_known_sizes(node: fx.Node) -> bool:
    """Whether no size of a value is made from the values of a tensor, which nobody knows before a call."""
    return all(isinstance(size, int) or size.node.has_hint() for size in node.meta["val"].shape)


def _cut(program: Program, projection: Projection) -> dict[str, int]:
    whole: torch.nn.Parameter = get_attribute(program.module, projection.weight)
    kept = _find_kept(projection)
    features = torch.arange(len(projection.rows)) if kept is None else kept.arrangement.rows.flatten()
    if len(features) == whole.shape[projection.axis]:
        return {}
    rows = projection.rows[features].to(whole.device)
    weight = whole.detach().index_select(projection.axis, rows)
    bias = None
    if projection.bias is not None:
        bias = get_attribute(program.module, projection.bias).detach().index_select(0, rows)
    gained = resize(program, projection, weight, bias)
    if kept is not None:
        with inserting_before(kept.node) as insert:
            layer = Layer(kept.arrangement, kept.node, insert, avoid=kept.between)
            made = layer.lay_out(projection.result, projection.feature)
        take_place(made, kept.node)
    return {path: -count for path, count in gained.items()}


def _find_kept(projection: Projection) -> _Kept | None:
    """Follow the projection through moves to the first node with the fewest rows."""
    indices, count = indices_of(hints(projection.result.meta["val"]), projection.feature)
    chain: list[tuple[fx.Node, torch.Tensor, torch.Tensor]] = []
    node = projection.result
    while len(node.users) == 1:
        (user,) = node.users
        if not is_move(user) or user.args[0] is not node:
            break
        indices = push(user, indices)
        node = user
        if isinstance(indices[0], torch.Tensor):
            chain.append((node, *indices))
    if not chain:
        return None
    fewest = len(chain[-1][2].unique())
    if fewest == len(projection.rows):
        return None
    node, tokens, rows = next(entry for entry in chain if len(entry[2].unique()) == fewest)
    found = arrange(tokens, rows, count)
    if found is None or not fits(found, node):
        return None
    return _Kept(node, found, frozenset(entry[0] for entry in chain))
