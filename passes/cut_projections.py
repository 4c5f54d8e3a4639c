"""Cut fused projections: where only the values of a QKV projection are still read, only their rows stay."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxreuse.attention import AttentionSite
from fxreuse.nodes import inserting_before, is_call, remove_dead, replace
from fxreuse.program import Program, fixed_size, get_attribute, module_stack

_aten = torch.ops.aten
_MOVES = {
    _aten.view.default, _aten.reshape.default, _aten.transpose.int, _aten.permute.default, _aten.unsqueeze.default,
    _aten.squeeze.dim, _aten.contiguous.default, _aten.clone.default, _aten.unflatten.int, _aten.flatten.using_ints,
    _aten.select.int, _aten.slice.Tensor, _aten.narrow.default, _aten.split.Tensor, _aten.split.sizes,
    _aten.split_with_sizes.default, _aten.chunk.default, _aten.unbind.int, _aten.movedim.int, operator.getitem,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Projection:
    """A product with a weight parameter: ``rows`` is the weight's axis of output features."""

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    rows: int


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Where the kept rows of a projection go: the first node that has just them, and its layout.

    ``order`` are the axes of that node, those of tokens first as the projection has them, then those of rows;
    ``rows`` are the weight's rows in the order of the row axes.
    """

    node: fx.Node
    order: tuple[int, ...]
    rows: torch.Tensor


def cut_projections(program: Program, followers: Sequence[AttentionSite]) -> dict[str, int]:
    """Cut the fused projections of followers to the rows that are still read. Works on the program in place.

    Which weight row feeds which channel is read off the graph: coordinates of tokens and rows are pushed through the
    views, permutations and splits behind the projection, at the sizes of the example. Sound because a row that reaches
    no reader changes nothing, and because a layout that mixes tokens and rows is left alone.

    Returns the parameters that became smaller, path → number of elements removed.
    """
    removed: dict[str, int] = {}
    layers = {site.layer_path for site in followers}
    for node in list(program.graph.nodes):
        projection = _read_projection(program, node)
        if projection is None or layers.isdisjoint(module_stack(node)):
            continue
        kept = _find_kept(projection)
        if kept is not None:
            removed |= _cut(program, projection, kept)
    remove_dead(program.graph)
    return removed


def _read_projection(program: Program, node: fx.Node) -> _Projection | None:
    if is_call(node, _aten.linear.default):
        weight, bias, rows = node.args[1], node.args[2] if len(node.args) > 2 else None, 0
    elif is_call(node, _aten.addmm.default) and not node.kwargs:
        weight, bias, rows = node.args[2], node.args[0], 1
    else:
        return None
    for tensor in (weight, bias):
        if tensor is None:
            continue
        if not isinstance(tensor, fx.Node) or tensor.op != "get_attr" or len(tensor.users) != 1:
            return None
        if not isinstance(get_attribute(program.module, str(tensor.target)), torch.nn.Parameter):
            return None
    return _Projection(node, weight, bias, rows)  # type: ignore[arg-type]


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _find_kept(projection: _Projection) -> _Kept | None:
    """Follow the projection through views and splits to the first node with the fewest rows."""
    shape = [_hint(size) for size in projection.node.meta["val"].shape]
    width = shape[-1]
    tokens = torch.arange(math.prod(shape[:-1])).reshape(*shape[:-1], 1).expand(shape)
    rows = torch.arange(width).expand(shape)
    chain: list[tuple[fx.Node, torch.Tensor, torch.Tensor]] = []
    node, values = projection.node, (tokens, rows)
    while len(node.users) == 1:
        (user,) = node.users
        if user.op != "call_function" or user.target not in _MOVES or user.args[0] is not node:
            break
        values = tuple(_run(user, value) for value in values)
        node = user
        if isinstance(values[0], torch.Tensor):
            chain.append((node, *values))
    if not chain:
        return None
    final = chain[-1][2].unique()
    if len(final) == width:
        return None
    first = next((entry for entry in chain if len(entry[2].unique()) == len(final)), None)
    return None if first is None else _layout(*first, token_count=math.prod(shape[:-1]))


def _run(node: fx.Node, value: Any) -> Any:
    """The node's operator on plain tensors, symbolic sizes replaced by those of the example."""
    args, kwargs = fx.node.map_arg(
        (node.args[1:], node.kwargs),
        lambda n: _hint(n.meta["val"]) if not isinstance(n.meta["val"], torch.Tensor) else n,
    )
    return node.target(value, *args, **kwargs)  # type: ignore[operator]


def _layout(node: fx.Node, tokens: torch.Tensor, rows: torch.Tensor, token_count: int) -> _Kept | None:
    """The order of axes that makes a node tokens × rows, if no axis mixes the two."""
    axes = range(tokens.dim())
    row_axes = [axis for axis in axes if tokens.shape[axis] > 1 and _varies(rows, axis)]
    token_axes = [axis for axis in axes if axis not in row_axes]
    if any(_varies(tokens, axis) for axis in row_axes):
        return None
    for candidate in itertools.permutations(token_axes):
        order = (*candidate, *row_axes)
        flat = tokens.permute(order).reshape(math.prod(tokens.shape[axis] for axis in candidate), -1)
        if flat.shape[0] == token_count and bool((flat[:, 0] == torch.arange(token_count)).all()):
            return _Kept(node, order, rows.permute(order).reshape(token_count, -1)[0])
    return None


def _varies(values: torch.Tensor, axis: int) -> bool:
    return bool((values.narrow(axis, 0, 1) != values).any())


def _cut(program: Program, projection: _Projection, kept: _Kept) -> dict[str, int]:
    removed = {}
    for tensor, axis in ((projection.weight, projection.rows), (projection.bias, 0)):
        if tensor is None:
            continue
        path = str(tensor.target)
        old = get_attribute(program.module, path)
        selected = old.detach().index_select(axis, kept.rows.to(old.device))
        new = torch.nn.Parameter(selected, old.requires_grad)
        owner, _, name = path.rpartition(".")
        program.module.get_submodule(owner)._parameters[name] = new
        removed[path] = old.numel() - new.numel()
        fake = tensor.meta["val"].fake_mode
        with fake:
            tensor.meta["val"] = torch.nn.Parameter(torch.empty(new.shape, dtype=new.dtype, device=old.device))
    _relayout(projection, kept)
    return removed


def _relayout(projection: _Projection, kept: _Kept) -> None:
    """Bring the smaller projection into the shape and axis order of the node that it replaces."""
    source = projection.node
    with inserting_before(source) as insert:
        smaller = insert(source.target, *source.args, **source.kwargs)
    shape = kept.node.meta["val"].shape
    inverse = [kept.order.index(axis) for axis in range(len(kept.order))]
    with inserting_before(kept.node) as insert:
        sizes = [_size(insert, kept.node, smaller, shape[axis]) for axis in kept.order]
        made = insert(_aten.permute.default, insert(_aten.reshape.default, smaller, sizes), inverse)
    replace(kept.node, made)


def _size(insert: Any, node: fx.Node, smaller: fx.Node, size: Any) -> Any:
    """A size as a number, or as a node that has it."""
    number = fixed_size(size)
    if number is not None:
        return number
    wanted = str(size.node.expr)
    for candidate in node.graph.nodes:
        if candidate is node:
            break
        value = candidate.meta.get("val")
        if isinstance(value, torch.SymInt) and str(value.node.expr) == wanted:
            return candidate
    for source in _tensors_before(node):
        for dim, found in enumerate(source.meta["val"].shape):
            if fixed_size(found) is None and str(found.node.expr) == wanted:
                return insert(_aten.sym_size.int, source, dim)
    raise AssertionError(f"no node has the size {wanted}")


def _tensors_before(node: fx.Node) -> Any:
    for candidate in node.graph.nodes:
        if candidate is node:
            return
        if isinstance(candidate.meta.get("val"), torch.Tensor):
            yield candidate
