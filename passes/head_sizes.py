"""Write the sizes of a graph anew where they are made of heads or channels, and compute every shape again."""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxreuse.finding.axes import Part, sizes
from fxreuse.finding.follow import arguments, aten, packet
from fxreuse.layouts.projections import hint, set_parameter
from fxreuse.nodes import evaluate, inserting_before
from fxreuse.program import Program, get_attribute

from .head_axes import Tag
from .head_labels import Labels

_SHAPED = {
    aten.reshape: 1, aten.view: 1, aten.expand: 1, aten.broadcast_to: 1, aten.zeros: 0, aten.ones: 0, aten.empty: 0,
    aten.full: 0, aten.new_zeros: 1, aten.new_ones: 1, aten.new_empty: 1, aten.new_full: 1,
}  # fmt: skip


def apply_labels(program: Program, labels: Labels) -> None:
    """Bring a program into the sizes that its labels ask for, in place: parameters, written sizes, and all values.

    Shapes are computed without guards: that the new number of heads is the batch of the example, say, is an accident.
    Without the dispatcher in Python some operators (``pad``) would tie free sizes to those of the example.
    """
    values = (node.meta["val"] for node in labels.layouts)
    mode: FakeTensorMode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    guards = contextlib.nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()
    with guards, enable_python_dispatcher():
        _apply(program, labels, mode)


def _apply(program: Program, labels: Labels, mode: FakeTensorMode) -> None:
    for node in list(program.graph.nodes):
        if node not in labels.layouts:
            continue
        if node.op == "get_attr":
            _reshape_parameter(program, node, labels)
            continue
        try:
            _rewrite(node, labels)
            with mode:
                _refresh(program, node)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise labels.refusal(node, f"does not fit the new sizes: {str(error).splitlines()[0]}") from error
        _check_shape(node, labels)


def _reshape_parameter(program: Program, node: fx.Node, labels: Labels) -> None:
    if labels.changed(node):
        shape = [int(labels.dim_size(dim)) for dim in labels.layouts[node]]
        old = get_attribute(program.module, str(node.target))
        set_parameter(program, node, old.detach().reshape(shape))


def _refresh(program: Program, node: fx.Node) -> None:
    function = program.module.get_submodule(node.target) if isinstance(node.target, str) else node.target
    node.meta["val"] = evaluate(function, node.args, dict(node.kwargs))


def _rewrite(node: fx.Node, labels: Labels) -> None:
    """Write the sizes among a node's arguments anew."""
    op = packet(node)
    if op in _SHAPED:
        _rewrite_shape(node, labels, _SHAPED[op], 0)
    elif op is aten.unflatten:
        _rewrite_shape(node, labels, 2, arguments(node)["dim"] % len(sizes(node.all_input_nodes[0])))
    elif op in (aten.split, aten.split_with_sizes, aten.slice, aten.narrow):
        _rewrite_range(node, labels)


def _rewrite_shape(node: fx.Node, labels: Labels, position: int, first: int) -> None:
    shape: Any = list(node.args[position])  # type: ignore[arg-type]
    layout = labels.layouts[node]
    for axis in labels.changed(node):
        place = axis - first
        if not 0 <= place < len(shape) or shape[place] == -1:
            continue
        shape[place] = _resized(node, shape[place], layout[axis], labels)
    node.update_arg(position, shape)


def _resized(node: fx.Node, size: Any, dim: tuple[Part, ...], labels: Labels) -> Any:
    """A size with its factors of heads and channels exchanged for the new ones."""
    old = math.prod(int(part.size) for part in dim if isinstance(part.source, Tag))
    new = math.prod(int(labels.resized(part)) for part in dim if isinstance(part.source, Tag))
    if isinstance(size, int):
        return size // old * new
    with inserting_before(node) as insert:
        return insert(operator.mul, insert(operator.floordiv, size, old), new)


def _rewrite_range(node: fx.Node, labels: Labels) -> None:
    """The bounds of a range, and the sizes of pieces, in units of what is inside."""
    source = node.all_input_nodes[0]
    layout = labels.layouts.get(source, ())
    axis = arguments(node)["dim"] % len(sizes(source))
    inner = [part for part in (layout[axis] if layout else ()) if isinstance(part.source, Tag)]
    old = math.prod(int(part.size) for part in inner)
    new = math.prod(int(labels.resized(part)) for part in inner)
    if old == new:
        return
    for position in {aten.split: (1,), aten.split_with_sizes: (1,), aten.slice: (2, 3), aten.narrow: (2, 3)}[
        packet(node)
    ]:
        if len(node.args) > position:
            node.update_arg(position, _scaled(node.args[position], old, new))


def _scaled(value: Any, old: int, new: int) -> Any:
    if isinstance(value, (list, tuple)):
        return [_scaled(one, old, new) for one in value]
    if value is None or abs(value) >= 2**62:
        return value
    if value % old:
        raise ValueError(f"{value} is not a multiple of {old}")
    return value // old * new


def _check_shape(node: fx.Node, labels: Labels) -> None:
    """Raise where a value did not come out in the shape that its label says."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return
    expected = [labels.dim_size(dim) for dim in labels.layouts[node]]
    for axis, size in enumerate(expected):
        if len(expected) != value.dim() or (isinstance(size, int) and hint(value.shape[axis]) != size):
            shape = "×".join(str(one) for one in value.shape)
            raise labels.refusal(node, f"comes out as {shape} instead of {'×'.join(str(one) for one in expected)}")
