"""Followers whose queries or keys are computed although nobody contracts them any more."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxreuse.attention import AttentionSite
from fxreuse.program import Program, module_path
from fxreuse.record import Note


def still_computed(program: Program, followers: Sequence[AttentionSite]) -> list[Note]:
    """A note for every follower whose queries or keys something else still reads: less is saved than one expects.

    Arguments:
        program: the rewritten program, without dead nodes.
        followers: the sites that use another site's map.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    notes = []
    for site in followers:
        for name, operand in (("queries", site.nodes.query), ("keys", site.nodes.key)):
            node = None if operand is None else nodes.get(operand)
            if node is not None and operand not in site.nodes.values:
                text = f"its {name} are still computed: {_readers(node)}"
                notes.append(Note("cost", str(site), text, "this layer saves the attention map alone"))
    return notes


def _readers(node: fx.Node) -> str:
    """Who reads a value, by operator and module: ``aten.sum in encoder.gate``."""
    readers = (f"{user.target} in {module_path(user) or 'the model itself'}" for user in node.users)
    return "read by " + ", ".join(dict.fromkeys(readers))
