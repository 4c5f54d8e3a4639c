"""Calls that no rewritten graph can hold, refused by name right after export: FlexAttention, and torch.func transforms.

Both leave functions inside the graph. FlexAttention's score function runs in its own kernel only; `torch.vmap` and its
like leave pairs of calls that open and close a level, between which operators mean something else.
"""

from __future__ import annotations

import traceback

from torch import fx
from torch._higher_order_ops.flex_attention import flex_attention

from ..errors import UnsupportedError
from ..finding.unknown import FLEX_ATTENTION
from ..program import source_line
from .capture_errors import line_at_fault

_FLEX_FILE = "/torch/nn/attention/flex_attention.py"
_TRANSFORMS = ("torch._functorch", "torch._C._functorch")
_TRANSFORM = (
    "torch.vmap (or another transform of torch.func) leaves calls in the graph between which operators mean something "
    "else; write it with a batch axis and broadcasting"
)
_ELSE = "or capture only a part without it with target='path.of.the.encoder'"


def refuse_unrewritable(module: fx.GraphModule, name: str) -> None:
    """Raise for the first such call in a graph or in a region of it.

    Raises:
        UnsupportedError: names the call, the line that makes it, and what to do.
    """
    graphs = [part.graph for part in module.modules() if isinstance(part, fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    for is_such, reason in ((_is_flex_attention, FLEX_ATTENTION), (_is_of_a_transform, _TRANSFORM)):
        for node in filter(is_such, nodes):
            raise _refusal(name, source_line(node), reason)


def refuse_flex_attention(error: Exception, name: str) -> None:
    """Raise where an export failed inside FlexAttention, which on a CPU takes no tensors that need gradients.

    Raises:
        UnsupportedError: as `refuse_unrewritable`.
    """
    files = (frame.f_code.co_filename.replace("\\", "/") for frame, _ in traceback.walk_tb(error.__traceback__))
    if any(file.endswith(_FLEX_FILE) for file in files):
        raise _refusal(name, line_at_fault(error), FLEX_ATTENTION) from error


def _is_flex_attention(node: fx.Node) -> bool:
    return node.target is flex_attention


def _is_of_a_transform(node: fx.Node) -> bool:
    return str(getattr(node.target, "__module__", None)).startswith(_TRANSFORMS)


def _refusal(name: str, line: str, reason: str) -> UnsupportedError:
    return UnsupportedError(f"{name} cannot be rewritten. {f'At {line}: ' if line else ''}{reason}, {_ELSE}.")
