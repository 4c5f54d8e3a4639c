"""Which axes of which values are made of heads and of channels, followed through a graph in both directions."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence, Set
from typing import Any, NoReturn

import torch
from torch import fx

from fxreuse.attention import AttentionSite
from fxreuse.errors import UnsupportedError
from fxreuse.finding.axes import Layout, Part, Size, product, quotient, sizes
from fxreuse.finding.contractions import contraction
from fxreuse.finding.flow import Flow
from fxreuse.finding.follow import arguments, aten, packet, transfer
from fxreuse.finding.heads import CHANNEL, channel_layout
from fxreuse.layouts.projections import value_readers
from fxreuse.program import Program, get_attribute, module_path, module_stack, source_line

from .head_axes import (
    CREATIONS,
    JOINS,
    LENGTHENING,
    RANGES,
    REDUCTIONS,
    REGROUPS,
    SPLITS,
    Axes,
    Split,
    Tag,
    aligned_axes,
    behind_view,
    kinds_of,
    reduced,
    regrouped,
)


class Labels:
    """For every node that depends on a number of heads, the layout of its axes, in the sizes before the split.

    Parts whose source is a `Tag` change their size. A node that is not in ``layouts`` does not change.
    """

    def __init__(self, program: Program, flow: Flow, kept: Set[str] = frozenset()) -> None:
        """``kept`` are the paths of attentions that keep their heads."""
        self.program, self.flow = program, flow
        self._kept = kept
        self.layouts: dict[fx.Node, Layout] = {}
        self._ends: set[fx.Node] = set()
        self._contexts: set[fx.Node] = set()
        self._after: set[fx.Node] = set()
        self._sites: list[AttentionSite] = []

    def add(self, site: AttentionSite, split: Split) -> None:
        """Label the operands of a site's attention, and what they are made of."""
        self._sites.append(site)
        node = self.program.node
        query, key = node(str(site.nodes.query)), node(str(site.nodes.key))
        summed = self._summed(site, query, key)
        for operand in (query, key):
            self._operand(operand, summed[operand], split)
        for name, context in zip(site.nodes.values, site.nodes.contexts, strict=True):
            self._contexts.add(node(context))
            self._operand(node(name), self._channels(node(context), node(name)), split)

    def _summed(self, site: AttentionSite, query: fx.Node, key: fx.Node) -> dict[fx.Node, set[int]]:
        """The axes of channels of queries and keys."""
        if site.fused:
            return {operand: {len(sizes(operand)) - 1} for operand in (query, key)}
        for user in query.users:
            found = contraction(user)
            if found is not None and {found.left, found.right} == {query, key}:
                sides = {query: found.side(query)[0], key: found.side(key)[0]}
                return {o: {i for i, label in enumerate(s) if label in found.summed} for o, s in sides.items()}
        raise AssertionError(f"no product of {query} and {key}")

    def _channels(self, context: fx.Node, values: fx.Node) -> set[int]:
        """The axes of channels of values."""
        found = contraction(context)
        if found is None:
            return {len(sizes(values)) - 1}
        labels, _, others = found.side(values)
        return {i for i, label in enumerate(labels) if label in found.axes and label not in others}

    def _operand(self, operand: fx.Node, channels: set[int], split: Split) -> None:
        """Label an operand as recognition reads it: what comes from channels of a projection is heads or channels."""
        layout = []
        for axis, dim in enumerate(channel_layout(operand, self.flow)):
            tag = Tag("channels" if axis in channels else "heads", split)
            parts = [dataclasses.replace(p, source=tag if p.source == CHANNEL else None, piece=()) for p in dim]
            layout.append(tuple(parts))
        self._demand(operand, tuple(layout))

    def follow(self) -> None:
        """Label everything that is made of what is labelled."""
        while True:
            known = len(self.layouts)
            for node in self.program.graph.nodes:
                if node.op != "output" and node not in self.layouts:
                    self._visit(node)
                elif node in self.layouts and node not in self._ends:
                    self._agree(node)
            if len(self.layouts) == known:
                return

    def resized(self, part: Part) -> Size:
        """The new size of a part."""
        if not isinstance(part.source, Tag):
            return part.size
        found = None if part.piece else part.source.resized(part.size)
        if found is None:
            raise UnsupportedError(f"{part.source.kind} of size {part.size} cannot be split so")
        return found

    def dim_size(self, dim: Sequence[Part]) -> Size:
        """The new size of a dimension."""
        return product(self.resized(part) for part in dim)

    def changed(self, node: fx.Node) -> set[int]:
        """The dimensions of a node that change their size."""
        layout = self.layouts.get(node, ())
        return {
            axis
            for axis, dim in enumerate(layout)
            if any(isinstance(part.source, Tag) for part in dim)
            and self._guarded(node, dim) != product(part.size for part in dim)
        }

    def _guarded(self, node: fx.Node, dim: Sequence[Part]) -> Size:
        try:
            return self.dim_size(dim)
        except UnsupportedError as error:
            raise self.refusal(node, f"takes heads or channels apart ({error})") from None

    def _set(self, node: fx.Node, layout: Layout) -> None:
        if not any(isinstance(part.source, Tag) for dim in layout for part in dim):
            return
        self.layouts[node] = layout
        if node in self._contexts or any(operand in self._after for operand in node.all_input_nodes):
            self._after.add(node)

    # Forward

    def _visit(self, node: fx.Node) -> None:
        read = [operand for operand in node.all_input_nodes if operand in self.layouts]
        if not read:
            return
        if all(operand in self._after and not self.changed(operand) for operand in read):
            return
        if packet(node) in CREATIONS or not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            return
        layout = self._made(node, read)
        if layout is None:
            if any(self.changed(operand) for operand in read):
                self._refuse(node, "depends on the number of heads in a way that cannot be followed")
            return
        self._set(node, layout)

    def _made(self, node: fx.Node, read: list[fx.Node]) -> Layout | None:
        aligned = aligned_axes(node, self.program)
        if aligned is not None:
            return self._joined(node, *aligned)
        operand = read[0]
        layout, op = self.layouts[operand], packet(node)
        if op in SPLITS or op is aten.unbind:
            return layout
        if op is operator.getitem and (packet(operand) in SPLITS or packet(operand) is aten.unbind):
            return self._taken(node, operand, layout)
        if op in RANGES or op is aten.select:
            return self._ranged(node, layout, arguments(node)["dim"] % len(layout), op is aten.select)
        if op in REDUCTIONS:
            return reduced(node, layout)
        if self.changed(operand):
            self._check_widths(node, operand)
        if op in REGROUPS:
            return regrouped(layout, sizes(node))
        return transfer(node, operand, layout, self.program)

    def _check_widths(self, node: fx.Node, operand: fx.Node) -> None:
        """Raise where an operator has a width of its own for what changes its size."""
        if "norm" in str(packet(node)) or node.op == "call_module":
            self._refuse(node, "normalises the channels of a head, or heads, whose number is fixed")
        if packet(node) in LENGTHENING:
            resized = [axis for axis in self.changed(operand) if sizes(node)[axis] != sizes(operand)[axis]]
            if resized:
                self._refuse(node, "lengthens an axis of heads or channels")

    def _joined(self, node: fx.Node, operands: Axes, axes: list[Any]) -> Layout:
        """The layout of what several operands make together; those that have the old sizes are labelled first."""
        parts: dict[Any, tuple[Part, ...]] = {}
        for operand, keys in operands:
            for key, dim in zip(keys, self.layouts.get(operand, ()), strict=False):
                if key is not None and any(isinstance(part.source, Tag) for part in dim):
                    known = parts.setdefault(key, dim)
                    if self._guarded(node, known) != self._guarded(node, dim):
                        self._refuse(node, "brings heads and channels together that are split in different ways")
        for operand, keys in operands:
            self._bring_in(operand, keys, parts)
        return tuple(
            parts.get(key, (Part(None, size),)) if size != 1 else (Part(None, size),)
            for key, size in zip(axes, sizes(node), strict=True)
        )

    def _bring_in(self, operand: fx.Node, keys: list[Any], parts: dict[Any, tuple[Part, ...]]) -> None:
        own = self.layouts.get(operand)
        wanted, changes = [], False
        for axis, (key, size) in enumerate(zip(keys, sizes(operand), strict=True)):
            dim = parts.get(key)
            has_it = own is not None and any(isinstance(part.source, Tag) for part in own[axis])
            if dim is None or size == 1 or has_it:
                wanted.append((Part(None, size),) if own is None else own[axis])
                continue
            wanted.append(dim)
            changes = changes or self._guarded(operand, dim) != size
        if changes:
            if own is not None:
                self._refuse(operand, "has an axis of heads or channels that cannot be told from others")
            self._demand(operand, tuple(wanted))

    def _agree(self, node: fx.Node) -> None:
        """A node that was labelled from behind still has operands that are not."""
        aligned = aligned_axes(node, self.program)
        if aligned is not None:
            self._joined(node, *aligned)

    def _taken(self, node: fx.Node, split: fx.Node, layout: Layout) -> Layout | None:
        dim = arguments(split)["dim"] % len(layout)
        return self._ranged(node, layout, dim, packet(split) is aten.unbind)

    def _ranged(self, node: fx.Node, layout: Layout, dim: int, drop: bool) -> Layout:
        """A range of a dimension, or one place of it."""
        tagged = any(isinstance(part.source, Tag) for part in layout[dim])
        if drop:
            if tagged:
                self._refuse(node, "takes single heads or channels")
            return (*layout[:dim], *layout[dim + 1 :])
        size = sizes(node)[dim]
        whole = product(part.size for part in layout[dim])
        kept: tuple[Part, ...] | None = layout[dim] if whole == size else (Part(None, size),)
        if tagged and whole != size:
            outer, rest = layout[dim][0], layout[dim][1:]
            times = quotient(size, product(part.size for part in rest))
            if isinstance(outer.source, Tag) or times is None:
                self._refuse(node, "takes a part of the channels of a head, as rotary embeddings of a fixed width do")
            kept = rest if times == 1 else (Part(None, times), *rest)
        assert kept is not None
        return (*layout[:dim], kept, *layout[dim + 1 :])

    # Back

    def _demand(self, node: fx.Node, layout: Layout) -> None:
        """Label a node that has to have these axes, and what it is made of, back to what does not change its shape."""
        known = self.layouts.get(node)
        if known is not None:
            if [self._guarded(node, dim) for dim in known] != [self._guarded(node, dim) for dim in layout]:
                self._refuse(node, "is used with two different splits into heads")
            return
        self._set(node, layout)
        if not self.changed(node):
            self._ends.add(node)
            return
        for operand, wanted in self._operands(node, layout):
            self._demand(operand, wanted)

    def _operands(self, node: fx.Node, layout: Layout) -> Iterator[tuple[fx.Node, Layout]]:
        if node.op == "get_attr":
            self._check_parameter(node, layout)
            return
        op = packet(node)
        if op in CREATIONS:
            return
        if "norm" in str(op):
            self._refuse(node, "normalises the channels of a head, or heads, whose number is fixed")
        if op in JOINS and arguments(node)["dim"] % len(layout) in self.changed(node):
            self._refuse(node, "joins parts of the channels of a head, as rotary embeddings of a fixed width do")
        aligned = aligned_axes(node, self.program)
        if aligned is not None:
            yield from self._behind(aligned, layout)
            return
        source: Any = node.args[0] if node.op == "call_function" and node.args else None
        behind = behind_view(node, source, layout) if isinstance(source, fx.Node) else None
        if behind is None:
            self._refuse_source(node, layout)
        yield source, behind

    def _behind(self, aligned: tuple[Axes, list[Any]], layout: Layout) -> Iterator[tuple[fx.Node, Layout]]:
        """The operands that are labelled from behind: those that have all that the node has.

        Others (a norm of the same channels, a factor for each head) are seen on the way forward.
        """
        operands, axes = aligned
        parts = dict(zip(axes, layout, strict=True))
        wanted = {
            operand: tuple(
                parts.get(key, (Part(None, size),)) if size != 1 and key is not None else (Part(None, size),)
                for key, size in zip(keys, sizes(operand), strict=True)
            )
            for operand, keys in operands
        }
        whole = {operand: own for operand, own in wanted.items() if kinds_of(own) == kinds_of(layout)}
        yield from (whole or {operand: own for operand, own in wanted.items() if kinds_of(own)}).items()

    def _check_parameter(self, node: fx.Node, layout: Layout) -> None:
        """Raise where a parameter, or what else is there before any input, cannot be split anew."""
        value = get_attribute(self.program.module, str(node.target))
        flat = [part for dim in layout for part in dim if part.size != 1]
        kinds = [part.source.kind if isinstance(part.source, Tag) else None for part in flat]
        if not isinstance(value, torch.nn.Parameter) or "heads" not in kinds or "channels" not in kinds:
            self._refuse_source(node, layout)
        if kinds.index("channels") != kinds.index("heads") + 1 or len(kinds) - kinds.count(None) != 2:
            self._refuse(node, "has its channels not within its heads")
        paths = (module_path(user) for user in value_readers(node))
        elsewhere = next((path for path in paths if path in self._kept), None)
        if elsewhere is not None:
            self._refuse(node, f"is also read in {elsewhere}, which keeps its heads")

    def _refuse_source(self, node: fx.Node, layout: Layout) -> NoReturn:
        kinds = kinds_of(layout)
        parameter = next((n for n in self._ancestors(node) if n.op == "get_attr"), None)
        what = "" if parameter is None or parameter is node else f", made of {parameter.target},"
        if kinds == {"heads"}:
            self._refuse(
                node, f"{what} has an axis of heads and none of channels, so it cannot be split anew".lstrip(", ")
            )
        if kinds == {"channels"}:
            reason = f"{what} has an axis of the channels of one head and none of heads, so their number is fixed"
            self._refuse(node, reason.lstrip(", "))
        self._refuse(node, "is not followed back to a projection")

    def _ancestors(self, node: fx.Node) -> Iterator[fx.Node]:
        pending, seen = [node], {node}
        while pending:
            current = pending.pop()
            yield current
            ahead = [operand for operand in current.all_input_nodes if operand not in seen]
            seen.update(ahead)
            pending.extend(ahead)

    def refusal(self, node: fx.Node, reason: str) -> UnsupportedError:
        """An error that names the site, the node and its line."""
        line, within = source_line(node), module_stack(node)
        site = next((site for site in self._sites if site.path in within), self._sites[-1])
        return UnsupportedError(
            f"{site} cannot be split into another number of heads: {node.name} ({node.target}) {reason}"
            f"{f' ({line})' if line else ''}."
        )

    def _refuse(self, node: fx.Node, reason: str) -> NoReturn:
        raise self.refusal(node, reason)
