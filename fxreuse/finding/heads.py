"""Where the heads of an attention are: read from the way that projected channels take to the operands."""

from __future__ import annotations

import dataclasses

from torch import fx

from .axes import Layout, Part, Size, product, sizes, start
from .contractions import Contraction, contraction, is_convolution
from .flow import Flow
from .follow import followable, transfer

CHANNEL = "channel"
OTHER = "other"


def channel_layout(node: fx.Node, flow: Flow) -> Layout:
    """The layout of an operand in terms of the channels and the other axes of the projection that it comes from.

    Walks back through views, norms and elementwise operators to the product with a parameter (or the convolution), or
    else to whatever the walk ends at, whose last dimension are its channels.
    """
    path = [node]
    while not _is_projection(path[-1], flow):
        operands = followable(path[-1], flow.program)
        ahead = [o for o in operands if o in flow.tokens] or [o for o in operands if o in flow.parameters]
        if not ahead:
            break
        path.append(ahead[0])
    if len(path) == 1 and not _is_projection(node, flow):
        return _conventional(node)
    layout: Layout | None = start(path[-1], _channels(path[-1], flow))
    for operand, reader in zip(path[::-1], path[-2::-1], strict=False):
        layout = None if layout is None else transfer(reader, operand, layout, flow.program)
    return layout if layout is not None else _conventional(node)


def _is_projection(node: fx.Node, flow: Flow) -> bool:
    return is_convolution(node) or contraction(node) is not None


def _channels(node: fx.Node, flow: Flow) -> list[str]:
    """For every dimension of a projection's result, whether it counts channels."""
    rank = len(sizes(node))
    if is_convolution(node):
        return [CHANNEL if dim == 1 else OTHER for dim in range(rank)]
    found = contraction(node)
    if found is None or (found.left in flow.inputs) == (found.right in flow.inputs):
        return [CHANNEL if dim == rank - 1 else OTHER for dim in range(rank)]
    weight = found.right if found.left in flow.inputs else found.left
    labels, _, others = found.side(weight)
    return [CHANNEL if label in labels and label not in others else OTHER for label in found.axes]


def _conventional(node: fx.Node) -> Layout:
    """``(batch, heads, tokens, channels)``, where nothing better can be told."""
    rank = len(sizes(node))
    return start(node, [CHANNEL if dim == rank - 1 or (rank == 4 and dim == 1) else OTHER for dim in range(rank)])


@dataclasses.dataclass(frozen=True)
class Roles:
    """What the axes of an attention are for, read from its product of queries and keys.

    ``layout`` is that of the product's result, in terms of ``"batch"``, ``"heads"``, ``"queries"`` and ``"keys"``.
    ``over_channels`` says that it is channels that attend to channels, since the product sums over tokens.
    """

    layout: Layout
    kv_heads: Size
    head_dim: Size
    over_channels: bool = False


def score_roles(scores: Contraction, query: fx.Node, flow: Flow) -> Roles:
    """The roles of the axes of ``scores``, a product of ``query`` and the other operand."""
    labels, key, key_labels = scores.side(query)
    own = dict(zip(labels, channel_layout(query, flow), strict=True))
    other = dict(zip(key_labels, channel_layout(key, flow), strict=True))
    return _roles(scores.axes, scores.sizes(), own, other, _broadcast(labels, query))


def fused_roles(query: fx.Node, key: fx.Node, grouped: bool, flow: Flow) -> Roles:
    """The roles of the axes of the map that a fused attention makes of ``query`` and ``key``."""
    batch = "abcdefgh"[: len(sizes(query)) - 2]
    labels, key_labels = batch + "qc", batch + "kc"
    own = dict(zip(labels, channel_layout(query, flow), strict=True))
    other = dict(zip(key_labels, channel_layout(key, flow), strict=True))
    shape = {**dict(zip(key_labels, sizes(key), strict=True)), **dict(zip(labels, sizes(query), strict=True))}
    return _roles(batch + "qk", shape, own, other, frozenset() if grouped else _broadcast(labels, query))


def _broadcast(labels: str, node: fx.Node) -> frozenset[str]:
    return frozenset(label for label, s in zip(labels, sizes(node), strict=True) if s == 1)


def _roles(
    axes: str,
    shape: dict[str, Size],
    query: dict[str, tuple[Part, ...]],
    key: dict[str, tuple[Part, ...]],
    broadcast: frozenset[str],
) -> Roles:
    layout: list[tuple[Part, ...]] = []
    for label in axes:
        if label not in query:
            layout.append((Part("keys", shape[label]),))
            continue
        shared = label in key
        parts = key[label] if shared and label in broadcast else query[label]
        rest = "batch" if shared else "queries"
        layout.append(tuple(dataclasses.replace(p, source="heads" if p.source == CHANNEL else rest) for p in parts))
    kept = [part for label, parts in key.items() if label in axes for part in parts]
    summed = [label for label in key if label not in axes]
    return Roles(
        tuple(layout),
        kv_heads=product(part.size for part in kept if part.source == CHANNEL),
        head_dim=product(shape[label] for label in summed),
        over_channels=_all_are(CHANNEL, [key[label] for label in key if label in axes and label not in query])
        and _all_are(OTHER, [side[label] for label in summed for side in (query, key) if label in side]),
    )


def _all_are(source: str, dims: list[tuple[Part, ...]]) -> bool:
    return bool(dims) and all(part.source == source for dim in dims for part in dim)


def map_shape(layout: Layout) -> tuple[Size, Size, Size, Size]:
    """``(batch, heads, queries, keys)`` of a map whose axes have these roles."""
    parts = [part for dim in layout for part in dim]

    def total(role: str) -> Size:
        return product(part.size for part in parts if (part.source or "batch") == role)

    return total("batch"), total("heads"), total("queries"), total("keys")
