"""One attention without what its prior cuts: keys gathered before they are projected, scores hidden or skipped."""

from __future__ import annotations

import operator
from typing import NamedTuple

import sympy
import torch
from torch import fx

from fxreuse.finding.axes import product, sizes
from fxreuse.finding.contexts import find_contexts
from fxreuse.finding.flow import Flow
from fxreuse.finding.follow import arguments, packet
from fxreuse.finding.softmaxes import SOFTMAX
from fxreuse.layouts.projections import take_place, value_readers
from fxreuse.map_workspace import attention_map
from fxreuse.nodes import call, inserting_before, is_call, remove_dead
from fxreuse.priors.pruning import SitePruning
from fxreuse.priors.selection import Kept
from fxreuse.program import Program, get_attribute
from fxreuse.tree import free_path

from .fill_keys import filling
from .fused import OPERATOR, Fused
from .gather_keys import Gatherer
from .insert_priors import SitePrior, logarithm_of
from .new_tensors import input_of_length, leading, put_tensor, read_tensor
from .pruning_record import Work, cut_like, pruning_record
from .skip_blocks import Skipping, choose_skipping
from .split_projections import split_projections
from .unweighted import MAPS, Unweighted, follow_prior

_aten = torch.ops.aten


class PrunedSite(NamedTuple):
    """What was done with a site, and the buffers that were made for it, used or not."""

    record: SitePruning
    buffers: tuple[str, ...]


class SitePruner:
    """The pruning of one site in a program that the caller owns."""

    def __init__(self, program: Program, prior: SitePrior, kept: Kept) -> None:
        self._program, self._prior, self._kept = program, prior, kept
        self._left = kept.scores[..., kept.keys]
        self._cuts_keys = not bool(kept.keys.all())
        parameter = get_attribute(program.module, prior.parameter)
        self._device, self._dtype = parameter.device, parameter.dtype
        self._buffers: list[str] = []
        self._flow = Flow(program)
        self._gatherer: Gatherer | None = None
        self._skipping: Skipping | None = None
        self._filling = 0
        self._work: list[sympy.Expr] = []

    def prune(self, lowering: str) -> PrunedSite:
        """Take the prior out, and what it cuts."""
        logarithm = logarithm_of(self._program, self._prior)
        fused = self._fused(logarithm)
        self._skipping = choose_skipping(self._prior, self._kept, lowering, fused, self._device)
        if self._cuts_keys:
            self._filling = self._filled(fused)
            split_projections(self._program, self._operands(logarithm))
            self._flow = Flow(self._program)
            self._gatherer = Gatherer(self._program, self._flow, self._index(logarithm))
        found = follow_prior(*self._leading(logarithm), causal=self._prior.causal)
        for reader in [node for node in self._program.graph.nodes if node not in found]:
            for operand in [operand for operand in reader.all_input_nodes if operand in found]:
                if reader.target in MAPS:
                    self._map(reader, found[operand])
                elif reader.op != "output" and reader.target is not _aten.sym_size.int:
                    self._scores(reader, operand, found[operand])
        gathered = sympy.Integer(0) if self._gatherer is None else self._gatherer.work
        work = Work(self._filling, tuple(self._work), gathered)
        return PrunedSite(pruning_record(self._prior, self._kept, work, self._skipping), tuple(self._buffers))

    def _operands(self, logarithm: fx.Node) -> list[fx.Node]:
        """The keys and values of the fused attentions that the prior reaches; of others, what their maps meet."""
        found = follow_prior(logarithm, logarithm, causal=False)
        operands: list[fx.Node] = []
        for node in self._program.graph.nodes:
            if node not in found and any(operand in found for operand in node.all_input_nodes):
                if node.target in MAPS:
                    operands += node.args[1:3] if node.target is OPERATOR else node.args[1:2]
                if node.target is not OPERATOR:
                    dim = _softmax_dim(node)
                    contexts = [] if dim is None else find_contexts(node, dim, self._flow)
                    operands += [] if isinstance(contexts, str) else [context.values for context in contexts]
        return [operand for operand in operands if isinstance(operand, fx.Node)]

    def _filled(self, fused: list[Fused]) -> int:
        """How many keys are gathered twice, and hidden, so that the kernel is faster."""
        if not fused or self._skipping is not None:
            return 0
        prior, query = self._prior, fused[0].query.meta["val"]
        channels = prior.heads * prior.width // 2
        masked = not bool(self._left.all())
        queries, keys = self._left.shape[-2:]
        return filling(keys, queries, channels, masked, query.dtype, self._device.type)

    def _index(self, logarithm: fx.Node) -> fx.Node:
        """A node with the indices of the keys that are left; of those that a shorter input has not, the last one's.

        What is gathered in their place is hidden: no query sees a key behind it. So are those that fill the kernel's
        vectors, which are the last key again.
        """
        first = next(node for node in self._program.graph.nodes if node.op not in ("placeholder", "get_attr"))
        left = self._kept.keys.nonzero().flatten()
        path = self._buffer("kept_keys", torch.cat((left, left[-1:].expand(self._filling))))
        index = read_tensor(self._program, path, first)
        lengths = [node for node in _slices(logarithm) if _is_last(node)]
        if not lengths:
            return index
        wanted = lengths[-1].meta["val"].shape[-1].node.expr
        place = input_of_length(self._program, wanted, self._prior.admissible.shape[-1])
        with self._program.graph.inserting_before(first):
            length = call(self._program.graph, _aten.sym_size.int, place, {}, like=first)
            last = call(self._program.graph, operator.sub, (length, 1), {}, like=first)
            return call(self._program.graph, _aten.clamp.default, (index, None, last), {}, like=first)

    def _buffer(self, name: str, value: torch.Tensor) -> str:
        path = free_path(self._program.module, self._prior.parameter.rpartition(".")[0], name)
        put_tensor(self._program, path, value.to(self._device))
        self._buffers.append(path)
        return path

    def _leading(self, logarithm: fx.Node) -> tuple[fx.Node, fx.Node]:
        """What the prior adds at the length of a call, and what is added where it cuts."""
        name = "cut_scores" if self._gatherer is None else "cut_scores_of_all_keys"
        whole = self._buffer(name, cut_like(self._kept.scores, logarithm, self._dtype))
        cut = read_tensor(self._program, whole, logarithm)
        columns = None
        if self._gatherer is not None:
            left = torch.nn.functional.pad(self._left, (0, self._filling))
            columns = read_tensor(
                self._program, self._buffer("cut_scores", cut_like(left, logarithm, self._dtype)), logarithm
            )
        for node in _slices(logarithm):
            dim, length = node.args[1], node.args[3]
            assert isinstance(dim, int)
            assert isinstance(length, fx.Node)
            with inserting_before(node) as insert:
                cut = leading(insert, cut, dim, length)
                if columns is not None and not _is_last(node):
                    columns = leading(insert, columns, dim, length)
            logarithm = node
        if self._gatherer is not None and columns is not None:
            self._gatherer.known(cut, -1, columns)
        return logarithm, cut

    def _hides(self, mask: Unweighted) -> bool:
        """Whether a score that would be computed is hidden, by more than the other masks of the model."""
        if mask.triangle:
            return not bool(self._left.all())
        return not bool((self._left == self._prior.admissible[:, self._kept.keys]).all())

    def _is_causal(self, mask: Unweighted) -> bool:
        """Whether nothing is hidden but what a causal mask hides."""
        plain = mask.rest is None and not mask.hidden and mask.triangle and not self._cuts_keys
        return plain and bool((self._left == self._prior.admissible).all())

    def _fused(self, logarithm: fx.Node) -> list[Fused]:
        """The fused attentions that the prior reaches; none where it also reaches others."""
        found = follow_prior(logarithm, logarithm, causal=False)
        remove_dead(self._program.graph)  # what was made on the way
        readers = [user for node in found for user in node.users if user not in found and user.op != "output"]
        return [Fused.of(node) for node in readers] if all(is_call(node, OPERATOR) for node in readers) else []

    def _map(self, node: fx.Node, mask: Unweighted) -> None:
        """A map that has its mask as an argument."""
        skipping = self._skipping
        with inserting_before(node) as insert:
            is_causal = self._is_causal(mask)
            others = mask.rest is not None or bool(mask.hidden)
            hides = self._hides(mask) or (self._filling > 0 and others)
            shown = None if is_causal else mask.mask(insert, with_cut=hides and skipping is None)
            query, key = node.args[:2]
            assert isinstance(query, fx.Node)
            assert isinstance(key, fx.Node)
            if self._gatherer is not None:
                key = self._gatherer.gather(key, -2)
                if shown is not None and sizes(shown)[-1] != 1:
                    shown = self._gatherer.gather(shown, -1)
            if node.target is attention_map:
                self._count(query, sizes(query)[-1])
                made = insert(attention_map, query, key, shown, is_causal, *node.args[4:], **node.kwargs)
                self._contexts(node, made, -1)
                if self._gatherer is None:
                    take_place(made, node)
                return
            if shown is not None:
                shown = self._as_buffer(shown, node)
            if shown is None and self._filling:
                row = torch.zeros(1, int(self._kept.keys.sum()), dtype=query.meta["val"].dtype)
                path = self._buffer("hidden_keys", torch.nn.functional.pad(row, (0, self._filling), value=-torch.inf))
                shown = insert(_aten.type_as.default, read_tensor(self._program, path, node), query)
            fused = Fused.of(node)
            value = fused.value if self._gatherer is None else self._gatherer.gather(fused.value, -2)
            self._count(query, sizes(query)[-1] + sizes(value)[-1])
            operands = (query, key, value, shown, fused.dropout_p)
            if skipping is not None:
                made = skipping.attend(self._program, node, operands, fused, self._buffer)
            else:
                options = {"scale": fused.scale, "enable_gqa": fused.enable_gqa}
                made = insert(OPERATOR, *operands, is_causal, **options)
        take_place(made, node)

    def _as_buffer(self, mask: fx.Node, before: fx.Node) -> fx.Node:
        """A mask that is a buffer with more dimensions, as a buffer of that shape: no call is to make it again."""
        cast = packet(mask) is _aten.type_as
        source = mask.args[0] if cast else mask
        dims: list[int] = []
        while isinstance(source, fx.Node) and is_call(source, _aten.unsqueeze.default):
            dims.append(source.args[1])  # type: ignore[arg-type]
            source = source.args[0]
        if not dims or not isinstance(source, fx.Node) or str(source.target) not in self._buffers:
            return mask
        value = get_attribute(self._program.module, str(source.target))
        for dim in reversed(dims):
            value = value.unsqueeze(dim)
        made = read_tensor(self._program, self._buffer("cut_scores", value), before)
        with inserting_before(before) as insert:
            return insert(_aten.type_as.default, made, mask.args[1]) if cast else made

    def _scores(self, reader: fx.Node, operand: fx.Node, scores: Unweighted) -> None:
        """Scores that the model normalises itself."""
        with inserting_before(reader) as insert:
            masked = scores.mask(insert, with_cut=self._cuts_keys or self._hides(scores))
            assert masked is not None
        reader.replace_input_with(operand, masked)
        dim = _softmax_dim(reader)
        if not self._work:
            self._count(reader, self._prior.width)
        gathered = masked if self._gatherer is None or dim is None else self._gatherer.gather(masked, dim)
        for user in set(operand.users).difference(value_readers(operand)):
            if gathered < user:
                user.replace_input_with(operand, gathered)
        if gathered is masked:
            return
        assert dim is not None
        with inserting_before(reader.next) as insert:
            args, kwargs = fx.node.map_arg((reader.args, reader.kwargs), lambda a: gathered if a is masked else a)
            made = insert(reader.target, *args, **kwargs)
        self._contexts(reader, made, dim)

    def _contexts(self, node: fx.Node, made: fx.Node, dim: int) -> None:
        """Products of a map with values, over the keys that are left."""
        contexts = find_contexts(node, dim % len(sizes(node)), Flow(self._program))
        assert not isinstance(contexts, str), contexts
        if node.target is attention_map:
            self._work += [self._batch(node, 2) * context.value_dim for context in contexts]
        if self._gatherer is None:
            return
        self._gatherer.known(node, dim, made)
        for context in contexts:
            take_place(self._gatherer.contract(context.node), context.node)

    def _count(self, node: fx.Node, width: object) -> None:
        """What a score costs: in one attention whose query, or scores, a node is."""
        self._work.append(self._batch(node, 2) * sympy.sympify(width))

    def _batch(self, node: fx.Node, last: int) -> sympy.Expr:
        return sympy.sympify(product(sizes(node)[:-last])) / self._prior.heads


def _slices(logarithm: fx.Node) -> list[fx.Node]:
    """The nodes that take the leading part of what a prior adds."""
    found = [logarithm]
    while len(found[-1].users) == 1 and is_call(next(iter(found[-1].users)), _aten.slice.Tensor):
        found.append(next(iter(found[-1].users)))
    return found[1:]


def _is_last(node: fx.Node) -> bool:
    return bool(node.args[1] == -1)


def _softmax_dim(node: fx.Node) -> int | None:
    """The dimension that a softmax, or the operator of a map, normalises over."""
    if node.target is attention_map:
        return len(sizes(node)) - 1
    return arguments(node)["dim"] % len(sizes(node)) if packet(node) in SOFTMAX else None
