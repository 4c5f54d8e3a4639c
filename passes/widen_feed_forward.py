"""Wider feed-forward layers: what reuse saved, reinvested (Recycle-and-Distill)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fxreuse.errors import PlanError, UnsupportedError
from fxreuse.finding.follow import aten, packet
from fxreuse.layouts.feed_forward import FeedForward, readers
from fxreuse.layouts.projections import Projection, resize
from fxreuse.nodes import evaluate
from fxreuse.program import Program, get_attribute
from fxreuse.tree import reads

from .fresh import fresh

_SIZED = frozenset({aten.view, aten.reshape, aten._unsafe_view})


def widen_feed_forward(program: Program, found: Sequence[FeedForward], units: Sequence[int]) -> dict[str, int]:
    """Make feed-forward layers wider by some units each, in place. Exact tier: the model computes what it did.

    The new units read their input by random rows and reach the output by columns of zeros. Sound because every unit of
    a feed-forward layer is computed from the input by itself, and added to the output times its column: zero here, for
    any input. The columns have gradients at once, and the rows as soon as the columns are not zero any more. (Copies of
    old units would be equal for ever.)

    Arguments:
        program: a program that the caller owns; it is changed.
        found: its feed-forward layers, as `find_feed_forward` gives them. Those of a module that
            is called several times share their weights, which are widened once.
        units: by how many units each becomes wider.

    Returns:
        The parameters that became larger, path → number of elements added.

    Raises:
        UnsupportedError: where something else reads a weight as well.
    """
    added: dict[str, int] = {}
    by_weights: dict[frozenset[str], list[tuple[FeedForward, int]]] = {}
    for one, extra in zip(found, units, strict=True):
        if extra:
            by_weights.setdefault(one.weights, []).append((one, extra))
    for shared in by_weights.values():
        _check_readers(program, [one for one, _ in shared])
        added |= _widen(program, [one for one, _ in shared], max(extra for _, extra in shared))
    return added


def units_to_width(found: Sequence[FeedForward], width: int) -> list[int]:
    """The units that each feed-forward layer lacks to a width.

    Raises:
        PlanError: where one is wider already.
    """
    for one in found:
        if one.width > width:
            raise PlanError(
                f"ffn={width} is narrower than the feed-forward layer of {one.layer}, which has the width {one.width}; "
                f"choose {one.width} or more."
            )
    return [width - one.width for one in found]


def units_to_size(found: Sequence[FeedForward], missing: int, aim: str) -> list[int]:
    """The same number of units for each feed-forward layer, as many as stay within a number of parameters.

    Arguments:
        found: the feed-forward layers.
        missing: the number of parameters that are to be spent.
        aim: what they would bring the model to, for the message.

    Raises:
        PlanError: where there are too many parameters already.
    """
    if missing < 0:
        raise PlanError(
            f"ffn=match: without wider feed-forward layers the model has {-missing:,} parameters more than {aim}; "
            "leave ffn= out, or widen values less."
        )
    one_of_each = {one.weights: one for one in found}
    return [missing // sum(one.size_of_unit for one in one_of_each.values())] * len(found)


def _check_readers(program: Program, calls: Sequence[FeedForward]) -> None:
    """Nobody else may read the weights, or a parameter that they are tied to."""
    projections = [projection for one in calls for projection in _projections(one)]
    own = {node for projection in projections for node in (projection.node, projection.result, *projection.weights)}
    own |= {node for projection in projections for node in projection.biases}
    paths = {str(node.target) for node in own if node.op == "get_attr"}
    everything = reads(program)
    tensors = {id(everything[path]) for path in paths}
    tied = [path for path, tensor in everything.items() if id(tensor) in tensors and path not in paths]
    for path in sorted(paths):
        strangers = [node.name for node in readers(program, path) if node not in own]
        if strangers or tied:
            raise UnsupportedError(
                f"the feed-forward layer of {calls[0].layer} cannot be made wider: its {path} is also read "
                f"by {(strangers or tied)[0]}. Leave ffn= out."
            )


def _widen(program: Program, calls: Sequence[FeedForward], extra: int) -> dict[str, int]:
    """Widen feed-forward layers that have the same weights."""
    added: dict[str, int] = {}
    first = calls[0]
    ups = [_more_rows(program, up.projection, up.parts, extra) for up in first.ups]
    down = _more_columns(program, first.down, extra)
    for one in calls:
        gains = [resize(program, up.projection, *new) for up, new in zip(one.ups, ups, strict=True)]
        for node in one.between:
            _fit(program, node, one.width, one.width + extra)
        gains.append(resize(program, one.down, down, None))
        for gained in gains:
            added |= {path: count for path, count in gained.items() if count}
    return added


def _more_rows(
    program: Program, projection: Projection, parts: int, extra: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and the bias with new rows at the end of each part."""
    weight, bias = get_attribute(program.module, projection.weight).detach(), _bias(program, projection)
    rows, shift = fresh(program, projection, parts * extra)
    widened = [weight.movedim(projection.axis, 0).unflatten(0, (parts, -1)), rows.unflatten(0, (parts, -1))]
    weight = torch.cat(widened, 1).flatten(0, 1).movedim(0, projection.axis).contiguous()
    if bias is None or shift is None:
        return weight, None
    return weight, torch.cat([bias.unflatten(0, (parts, -1)), shift.unflatten(0, (parts, -1))], 1).flatten()


def _more_columns(program: Program, projection: Projection, extra: int) -> torch.Tensor:
    weight = get_attribute(program.module, projection.weight).detach()
    shape = list(weight.shape)
    shape[projection.inputs] = extra
    return torch.cat([weight, weight.new_zeros(shape)], projection.inputs)


def _bias(program: Program, projection: Projection) -> torch.Tensor | None:
    return None if projection.bias is None else get_attribute(program.module, projection.bias).detach()


def _projections(one: FeedForward) -> tuple[Projection, ...]:
    return (*(up.projection for up in one.ups), one.down)


def _fit(program: Program, node: fx.Node, width: int, wider: int) -> None:
    """Bring a node between the projections to the new width: sizes that it names, and its value."""
    if packet(node) in _SIZED:
        sizes = list(node.args[1])  # type: ignore[arg-type]
        if sizes[-1] == width:
            node.update_arg(1, [*sizes[:-1], wider])
    elif packet(node) in (aten.split, aten.split_with_sizes):
        sizes = node.args[1]  # type: ignore[assignment]
        node.update_arg(1, [wider] * len(sizes) if isinstance(sizes, (list, tuple)) else wider)
    called = program.module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    assert callable(called)
    node.meta["val"] = evaluate(called, node.args, dict(node.kwargs))
