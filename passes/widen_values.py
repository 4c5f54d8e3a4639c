"""Widen the values of followers: the parameters that map reuse saves, spent on wider heads (``values=2``)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from fxreuse.attention import AttentionSite
from fxreuse.errors import PlanError, UnsupportedError
from fxreuse.layouts.arrangement import ROWS, Insert, Layer, known_size, size_before
from fxreuse.layouts.layout import Way, WeightLayout, context_of, copies_between, named, way_of_output, way_of_values
from fxreuse.layouts.projections import is_move, is_unary, refresh, resize, take_place, value_readers
from fxreuse.nodes import inserting_before, is_call, map_nodes, remove_dead, replace
from fxreuse.program import Program, get_attribute
from fxreuse.tree import own_copy, reads

_aten = torch.ops.aten
_Weights = dict[str, tuple[torch.Tensor, "torch.Tensor | None"]]


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The two ways of one consumer of a map: from the values' weight to it, and from it to the output's weight."""

    site: AttentionSite
    values: Way
    output: Way
    copies: tuple[fx.Node, ...]

    def wider(self) -> set[fx.Node]:
        """The nodes whose values become wider."""
        first = self.values.projection
        return {first.node, first.result, *self.values.nodes, *self.copies, *self.output.nodes}

    def nodes(self) -> set[fx.Node]:
        """These, and the others that change with them."""
        projections = (self.values.projection, self.output.projection)
        return self.wider() | {n for p in projections for n in (p.node, p.result, *p.weights, *p.biases)}


def widen_values(program: Program, sites: Sequence[AttentionSite], factor: int) -> dict[str, int]:
    """Make the values of every head of some sites ``factor`` times as wide. Architecture tier, function-preserving.

    Heads stay; the weight of the values gets rows, the weight that reads the attention gets columns. New rows are
    random, as the module initialises its own, new columns are zero: the function is the same, and both learn. (Copies
    of what is there would keep equal gradients for ever.) Both weights are brought into the order (head, channel).
    Sound because the new channels are multiplied by zeros, and because nothing but the two projections sees them.

    Arguments:
        program: changed in place; spoiled where this raises. Fused projections have been cut to their values.
        sites: the sites to widen, such as the followers after reuse.
        factor: how many times as wide; 1 changes nothing.

    Returns:
        The parameters that grew, path → number of elements added.

    Raises:
        UnsupportedError: where something else reads a weight or sees the channels.
    """
    if factor < 1:
        raise PlanError(f"values={factor} asks for no values at all; give a whole number of at least 1.")
    if factor == 1:
        return {}
    pairs = [_pair(program, site, context) for site in sites for context in range(len(site.nodes.values))]
    _check(program, pairs)
    for pair in pairs:
        _move_sizes(pair)
    grown: dict[str, int] = {}
    weights: _Weights = {}
    for pair in pairs:
        for gained in (_widen_values(program, pair, factor, weights), _widen_output(program, pair, factor, weights)):
            for path, count in gained.items():
                grown[path] = grown.get(path, 0) + count
    remove_dead(program.graph)
    program.module.recompile()
    return grown


def _pair(program: Program, site: AttentionSite, context: int) -> _Pair:
    values, output = way_of_values(program, site, context), way_of_output(program, site, context)
    copies = copies_between(program.node(site.nodes.values[context]), context_of(program, site, context))
    return _Pair(site, values, output, tuple(copies))


def _check(program: Program, pairs: Sequence[_Pair]) -> None:
    """Raise where something else depends on the widths that will change."""
    own = {node for pair in pairs for node in pair.nodes()}
    tied = _tied(reads(program))
    layouts: dict[str, tuple[AttentionSite, torch.Tensor]] = {}
    for pair in pairs:
        for output, way in ((False, pair.values), (True, pair.output)):
            layout = way.layout(pair.site, output)
            size = get_attribute(program.module, layout.weight).shape[layout.axis]
            if not torch.equal(layout.rows.flatten().sort().values, torch.arange(size)):
                raise _refused(pair.site, f"{layout.weight} is not only of its {'output' if output else 'values'}")
            first, rows = layouts.setdefault(layout.weight, (pair.site, layout.rows))
            if not torch.equal(rows, layout.rows):
                raise _refused(pair.site, f"{layout.weight} is laid out in another way by {first}")
            for path in (layout.weight, layout.bias):
                if path in tied:
                    raise _refused(pair.site, f"{path} and {tied[path]} are one parameter")
            _check_readers(pair, way, own)
        _check_steps(program, pair)


def _tied(tensors: Mapping[str, torch.Tensor]) -> dict[str | None, str]:
    """Parameters that have another path, with that path."""
    paths: dict[int, list[str]] = {}
    for path, tensor in tensors.items():
        paths.setdefault(id(tensor), []).append(path)
    return {path: next(p for p in same if p != path) for same in paths.values() if len(same) > 1 for path in same}


def _check_readers(pair: _Pair, way: Way, own: set[fx.Node]) -> None:
    """Raise where a weight, or a value whose width changes, has a reader that is not widened with it."""
    for node in (*way.projection.weights, *way.projection.biases, *pair.wider()):
        for user in value_readers(node):
            if user not in own and not is_call(user, _aten.sym_size.int):
                what = way.projection.weight if node in way.projection.weights else node.name
                raise _refused(pair.site, f"{what} is also read by {named(user)}")


def _check_steps(program: Program, pair: _Pair) -> None:
    """Raise where something on the way has a width of its own."""
    projection = pair.values.projection
    for node in _without_prefix(pair.values):
        if not is_move(node) and not is_unary(node, program):
            raise _refused(pair.site, f"{named(node)} comes between its projection and its heads")
    for node in _prefix(pair.values):
        for other in node.all_input_nodes[1:] if not is_unary(node, program) else ():
            shape = other.meta["val"].shape if isinstance(other.meta["val"], torch.Tensor) else ()
            from_end = projection.result.meta["val"].dim() - projection.feature
            if len(shape) >= from_end and shape[-from_end] != 1:
                raise _refused(pair.site, f"{named(node)} has a width of its own")
    for node in pair.output.nodes[1:]:
        if not is_move(node) and not is_unary(node, program):
            raise _refused(pair.site, f"{named(node)} comes between its heads and the projection that reads them")


def _prefix(way: Way) -> list[fx.Node]:
    """The elementwise operators that come before every move."""
    return list(itertools.takewhile(lambda node: not is_move(node), way.nodes))


def _without_prefix(way: Way) -> list[fx.Node]:
    return list(way.nodes[len(_prefix(way)) :])


def _move_sizes(pair: _Pair) -> None:
    """Sizes that are read off what is laid out anew are read elsewhere."""
    for node in (*pair.values.nodes, *pair.output.nodes[1:]):
        for user in list(node.users):
            if is_call(user, _aten.sym_size.int):
                with inserting_before(user) as insert:
                    wanted = known_size(user.meta["val"])
                    replace(user, size_before(user, wanted, insert, frozenset(pair.nodes())))


def _widen_values(program: Program, pair: _Pair, factor: int, done: _Weights) -> dict[str, int]:
    """More rows for the weight of the values, and their way to the operand laid out anew."""
    way, site = pair.values, pair.site
    projection, layout = way.projection, way.layout(site, output=False)
    if layout.weight not in done:
        weight = get_attribute(program.module, layout.weight).detach()
        bias = None if layout.bias is None else get_attribute(program.module, layout.bias).detach()
        count = layout.rows.numel() * (factor - 1)
        rows, biases = _new_rows(program, layout, weight, bias, count)
        bias = None if bias is None or biases is None else _with_more(bias, layout.rows, 0, biases)
        done[layout.weight] = _with_more(weight, layout.rows, layout.axis, rows), bias
    gained = resize(program, projection, *done[layout.weight])
    base = projection.result
    for node in _prefix(way):
        refresh(node)
        base = node
    if way.nodes and base is not way.nodes[-1]:
        operand = way.nodes[-1]
        with inserting_before(operand) as insert:
            for node in _without_prefix(way):
                base = base if is_move(node) else _again(insert, node, base)
            made = _layer(way, operand, insert, factor, pair).lay_out(base, projection.feature)
        take_place(made, operand)
    for node in pair.copies[1:]:
        refresh(node)
    return gained


def _widen_output(program: Program, pair: _Pair, factor: int, done: _Weights) -> dict[str, int]:
    """Columns of zeros for the weight that reads the attention, and the way to it laid out anew."""
    way = pair.output
    projection, layout = way.projection, way.layout(pair.site, output=True)
    context = way.nodes[0]
    refresh(context)
    if layout.weight not in done:
        weight = get_attribute(program.module, layout.weight).detach()
        zeros = weight.new_zeros(_resized(weight, layout.axis, layout.rows.numel() * (factor - 1)))
        done[layout.weight] = _with_more(weight, layout.rows, layout.axis, zeros), None
    with inserting_before(projection.node) as insert:
        value = context
        for node in way.nodes[1:]:
            value = value if is_move(node) else _again(insert, node, value)
        shape = list(projection.source.meta["val"].shape)
        shape.append(shape.pop(projection.input_feature) * factor)
        avoid = frozenset(pair.nodes())
        sizes = [size_before(context, known_size(size), insert, avoid) for size in shape]
        value = _layer(way, context, insert, factor, pair).take_in(value, sizes)
        if projection.input_feature != len(shape) - 1:
            value = insert(_aten.movedim.int, value, -1, projection.input_feature)
    projection.node.replace_input_with(projection.source, value)
    return resize(program, projection, *done[layout.weight])


def _layer(way: Way, like: fx.Node, insert: Insert, factor: int, pair: _Pair) -> Layer:
    """The layer of an arrangement whose channels are wider, rows numbered by head and channel."""
    found = way.arrangement
    channels = [place for place in found.places(ROWS) if found.factors[place].axis in way.channels]
    heads = [place for place in found.places(ROWS) if place not in channels]
    (channel,) = channels
    sizes = {channel: found.factors[channel].size * factor}
    return Layer(found, like, insert, sizes, (*heads, channel), frozenset(pair.nodes()))


def _again(insert: Insert, node: fx.Node, value: fx.Node) -> fx.Node:
    """An elementwise operator once more, on another value."""
    source = node.all_input_nodes[0]
    args, kwargs = map_nodes((node.args, node.kwargs), lambda argument: value if argument is source else argument)
    return insert(node.target, *args, **kwargs)


def _with_more(old: torch.Tensor, rows: torch.Tensor, axis: int, new: torch.Tensor) -> torch.Tensor:
    """A tensor with some rows more for every head, on one of its axes, in the order (head, channel)."""
    heads = len(rows)
    kept = old.movedim(axis, 0)[rows.flatten().to(old.device)]
    parts = [part.reshape(heads, -1, *kept.shape[1:]) for part in (kept, new.movedim(axis, 0))]
    return torch.cat(parts, 1).flatten(0, 1).movedim(0, axis).contiguous()


def _resized(tensor: torch.Tensor, axis: int, size: int) -> list[int]:
    return [size if dim == axis else old for dim, old in enumerate(tensor.shape)]


def _new_rows(
    program: Program, layout: WeightLayout, weight: torch.Tensor, bias: torch.Tensor | None, count: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows as the module initialises its own; where it says nothing about that, normal with the deviation of the old.

    Biases likewise, or zero.
    """
    rows = weight.new_empty(_resized(weight, layout.axis, count))
    biases = None if bias is None else bias.new_zeros(count)
    owner, _, name = layout.weight.rpartition(".")
    module = program.originals.get(owner)
    if isinstance(module, (torch.nn.Linear, torch.nn.modules.conv._ConvNd)) and name == "weight":
        twin = own_copy(module)
        fresh = {"weight": rows, "bias": biases}
        twin._parameters = {key: None if new is None else torch.nn.Parameter(new) for key, new in fresh.items()}
        twin.reset_parameters()  # type: ignore[operator]
    else:
        deviation = 0.0 if weight.is_meta else float(weight.std(correction=0))
        rows.normal_(std=deviation or weight.shape[1 - layout.axis] ** -0.5)
    return rows, biases


def _refused(site: AttentionSite, reason: str) -> UnsupportedError:
    return UnsupportedError(f"{site}: its values cannot be widened, since {reason}.")
