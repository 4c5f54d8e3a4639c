"""What several layers make of one value in the same way becomes one value."""

from __future__ import annotations

import torch
from torch import fx

from fxreuse.nodes import replace

from .functional import may_alias


def merge_readers(source: fx.Node) -> int:
    """Merge the operators that read ``source``, and one another, with the same arguments. Returns how many are gone.

    Exact tier. Sound because an operator that draws nothing and writes nothing gives the same value for the same
    arguments, and the first of several comes before all readers of the others. Modules, whose behaviour depends on
    their mode, stay apart, and so do values that are written to in place later.

    It goes on behind what was merged, and no further: what only one layer does has no copy behind it.

    After a leader's map has taken the place of its followers', this leaves one copy of what all of them do to it alike:
    a weak attention suppression, say, or a cast.
    """
    order = {node: index for index, node in enumerate(source.graph.nodes)}
    reached = {source}
    merged = 0
    for node in list(source.graph.nodes):  # in this order a node is visited after its operands were merged
        if node not in reached:
            continue
        known: dict[str, fx.Node] = {}
        for user in sorted(node.users, key=order.__getitem__):
            if not _is_pure(user):
                continue
            first = known.setdefault(repr((str(user.target), user.args, user.kwargs)), user)
            if first is not user and not _is_written(first) and not _is_written(user):
                replace(user, first)
                reached.add(first)
                merged += 1
    return merged


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _is_written(node: fx.Node) -> bool:
    """Whether anything writes into the value of a node, or into a view of it."""
    aliases = [node]
    for alias in aliases:
        for user in alias.users:
            schema = getattr(user.target, "_schema", None)
            if schema is not None and schema.is_mutable:
                return True
            if may_alias(user) and user not in aliases:
                aliases.append(user)
    return False
