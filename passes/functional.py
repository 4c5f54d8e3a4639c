"""Turn views into reshapes and simple in-place operators into functional ones."""

from __future__ import annotations

import torch
from torch import fx

from fxreuse.nodes import call, is_call, map_nodes
from fxreuse.program import Program

from .steps import Pass

# Operators that may return a view of an argument although their schema does not say so.
_MAY_ALIAS = {
    torch.ops.aten.reshape.default,
    torch.ops.aten.contiguous.default,
    torch.ops.aten.to.dtype,
    torch.ops.aten.to.device,
    torch.ops.aten.to.dtype_layout,
    torch.ops.aten.type_as.default,
    torch.ops.aten.dropout.default,
    torch.ops.aten.flatten.using_ints,
    torch.ops.aten.einsum.default,
    torch.ops.aten.meshgrid.default,
    torch.ops.aten.meshgrid.indexing,
    torch.ops.aten.broadcast_tensors.default,
    torch.ops.aten.atleast_1d.default,
    torch.ops.aten.atleast_2d.default,
    torch.ops.aten.atleast_3d.default,
}
_VIEW = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


@Pass
def reshape_views(program: Program) -> None:
    """``view`` becomes ``reshape``. Exact tier.

    Sound because the two agree wherever a view is possible, and export has dropped the ``contiguous()`` calls that
    made it possible for the layouts that real kernels return.
    """
    for node in program.graph.nodes:
        if is_call(node, *_VIEW):
            node.target = torch.ops.aten.reshape.default


@Pass
def functionalise(program: Program) -> None:
    """``x.add_(y)`` and its like become ``x.add(y)`` with every later reader of ``x`` reading the result. Exact tier.

    Sound where nobody else can see ``x`` change: it is a fresh value (no input, parameter or buffer) or the only thing
    that is read of one, as ``linear(y).view(shape)`` is, and no view of it is read afterwards. Anything else keeps its
    in-place operator.
    """
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    for node in list(program.graph.nodes):
        functional = _functional_form(node)
        if functional is None:
            continue
        target = node.args[0]
        later = [user for user in target.users if user is not node and order[user] > order[node]]
        if _is_shared(target) or any(may_alias(user, target) for user in target.users if user is not node):
            continue
        with program.graph.inserting_before(node):
            made = call(program.graph, functional, node.args, dict(node.kwargs), like=node)
        if made.meta["val"].dtype != target.meta["val"].dtype or made.meta["val"].shape != target.meta["val"].shape:
            program.graph.erase_node(made)
            continue
        order[made] = order[node]
        for user in later:
            user.replace_input_with(target, made)
        node.replace_all_uses_with(made)
        program.graph.erase_node(node)


def _functional_form(node: fx.Node) -> torch._ops.OpOverload | None:
    """The functional twin of an in-place operator that changes only its first argument."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    space, _, name = node.target._schema.name.partition("::")
    if space != "aten" or not name.endswith("_") or name.endswith("__") or name in ("copy_", "set_", "resize_"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    overload = node.target._overloadname
    return getattr(packet, overload) if packet is not None and overload in packet.overloads() else None


def may_alias(node: fx.Node, source: fx.Node | None = None) -> bool:
    """Whether the value of a node shares its storage with an argument, as far as its schema says.

    With ``source``, whether it does so with that one: ``x.expand_as(source)`` reads only the sizes of ``source``.
    """
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return node.op == "call_function"
    aliased = [a.alias_info is not None for a in schema.arguments]
    if node.target in _MAY_ALIAS:
        first = next(i for i, a in enumerate(schema.arguments) if "Tensor" in str(a.type))
        aliased = [i == first for i in range(len(aliased))]
    elif all(result.alias_info is None for result in schema.returns):
        return False
    if source is None or not any(aliased):
        return True
    shared = [value for value, shares in zip(node.args, aliased, strict=False) if shares]
    shared += [node.kwargs.get(a.name) for a, shares in zip(schema.arguments, aliased, strict=True) if shares]
    found: list[fx.Node] = []
    map_nodes(shared, found.append)
    return source in found


def _is_shared(node: fx.Node) -> bool:
    """Whether somebody else may see a value change: not where it is fresh, or the only view of a fresh one."""
    while node.op == "call_function" and may_alias(node):
        source = node.args[0] if isinstance(node.target, torch._ops.OpOverload) and node.args else None
        if not isinstance(source, fx.Node) or not may_alias(node, source):
            return True
        if any(user is not node and not is_call(user, torch.ops.aten.sym_size.int) for user in source.users):
            return True
        node = source
    return node.op != "call_function"
