"""Which lowering of an attention over blocks is taken, and the nodes that it is made of."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxreuse.cost_model.attention_time import SharedMap
from fxreuse.cost_model.device import Device
from fxreuse.errors import UnsupportedError
from fxreuse.finding.axes import sizes
from fxreuse.priors.block_attention import (
    Counts,
    flex_attention_over_blocks,
    gathered_attention,
    refused_by_kernel,
)
from fxreuse.priors.selection import Kept, block_sums
from fxreuse.program import Program

from .fused import Fused
from .insert_priors import SitePrior
from .new_tensors import read_tensor


@dataclasses.dataclass(frozen=True)
class Skipping:
    """An attention over blocks: ``blocks`` is (heads or 1, rows, columns), True where a block has a score that is left.

    ``pairs`` is how many pairs of a query and a key these blocks have in all heads, and ``positions`` says of each key
    where it stands among the queries, if no query sees a key behind it.
    """

    lowering: str
    reason: str
    blocks: torch.Tensor
    block: int
    keys: int
    positions: torch.Tensor | None
    pairs: int

    @property
    def counts(self) -> Counts:
        """For every head, or for all together, how many keys each row of blocks has."""
        widths = torch.full((self.blocks.shape[-1],), self.block)
        widths[-1] -= -self.keys % self.block
        return tuple(tuple(row) for row in (self.blocks * widths).sum(-1).tolist())

    def attend(
        self,
        program: Program,
        node: fx.Node,
        operands: tuple[Any, ...],
        fused: Fused,
        buffer: Callable[[str, torch.Tensor], str],
    ) -> fx.Node:
        """A call over these blocks in front of a fused attention with the same operands, whose shape it has."""
        options = (fused.scale, fused.enable_gqa, self.pairs)

        def read(name: str, value: torch.Tensor) -> fx.Node:
            return read_tensor(program, buffer(name, value), node)

        positions = None if self.positions is None else read("key_positions", self.positions)
        if self.lowering == "flex":
            blocks = read("kept_blocks", self.blocks)
            return _call(node, flex_attention_over_blocks, *operands, *options, blocks, self.block, positions)
        columns = read("kept_columns", self.blocks.nonzero()[:, -1])
        return _call(node, gathered_attention, *operands, *options, columns, self.counts, self.block, positions)


def _call(node: fx.Node, function: Callable[..., torch.Tensor], *args: Any) -> fx.Node:
    """A call of the same value; to run it on fake tensors would settle which rows a free length has."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(function, args)
    made.meta = copy.copy(node.meta)
    return made


def choose_skipping(
    prior: SitePrior, kept: Kept, wanted: str, fused: Sequence[Fused], device: torch.device
) -> Skipping | None:
    """How the blocks that are cut are skipped; None for a mask.

    Arguments:
        prior: the prior.
        kept: what is left.
        wanted: the lowering of the plan.
        fused: the fused attentions that have these scores; none where the model computes its maps itself.
        device: where they are computed.

    Raises:
        UnsupportedError: the plan asks for a lowering that this attention cannot have.
    """
    block = prior.plan.block
    if wanted == "mask" or (wanted == "auto" and block == 1):
        return None
    left, positions = kept.scores[..., kept.keys], kept.keys.nonzero().flatten() if prior.causal else None
    obstacle = _obstacle(prior, left, positions, fused)
    if obstacle is not None:
        if wanted == "auto":
            return None
        raise UnsupportedError(f"{prior.site}: lowering={wanted} {obstacle}; use lowering=mask")
    blocks = block_sums(left.double(), block) > 0
    lengths = (left.shape[-2], left.shape[-1])
    area = block_sums(torch.ones(lengths, dtype=torch.float64), block)
    pairs = int((blocks * area).sum()) * prior.heads // len(blocks)
    lowering = wanted if wanted != "auto" else "gather" if device.type in ("cpu", "meta") else "flex"
    refused = None
    if lowering == "flex":
        refusals = (refused_by_kernel(device, block, *_widths_and_type(one)) for one in fused)
        refused = next(filter(None, refusals), None)
    if refused is not None:
        if wanted == "auto":
            return None
        raise UnsupportedError(f"{prior.site}: lowering=flex {refused}; use lowering=mask or gather, or another block=")
    share = pairs / (prior.heads * lengths[0] * lengths[1])
    reason = f"{100 * (1 - share):.1f} % of the blocks of {block}×{block} scores are skipped"
    skipping = Skipping(lowering, reason, blocks, block, lengths[1], positions, pairs)
    if wanted == "auto" and lowering == "gather":
        seconds = _seconds(prior, skipping, lengths)
        shown = ", ".join(f"{1e3 * time:.1f} ms" for time in seconds)
        if seconds[0] >= seconds[1]:
            return None
        return dataclasses.replace(skipping, reason=f"{reason}; gathered, with a mask: {shown}")
    return skipping


def _widths_and_type(fused: Fused) -> tuple[tuple[int, int], torch.dtype]:
    """Of the heads of a fused attention: how wide those of queries and of values are, and their numbers."""
    return (sizes(fused.query)[-1], sizes(fused.value)[-1]), fused.query.meta["val"].dtype


def _seconds(prior: SitePrior, skipping: Skipping, lengths: tuple[int, int]) -> tuple[float, float]:
    """What a CPU takes for one sample with gathered keys, and with a mask, as the cost model has it."""
    device, (queries, keys) = Device.typical_cpu(), lengths
    width = prior.width // 2

    def attention(heads: int, queries: int, keys: int, masked: bool) -> float:
        return SharedMap(heads, queries, keys, width, prior.width - width, 1, masked=masked).computed_again(device)

    heads = prior.heads // len(skipping.blocks)
    counts = [count for head in skipping.counts for count in head]
    gathered = sum(attention(heads, skipping.block, n, skipping.positions is not None) for n in counts)
    moved = 2 * heads * sum(counts) * prior.width * torch.float32.itemsize
    return gathered + moved / device.memory, attention(prior.heads, queries, keys, True)


def _obstacle(
    prior: SitePrior, left: torch.Tensor, positions: torch.Tensor | None, fused: Sequence[Fused]
) -> str | None:
    """Why blocks cannot be skipped."""
    block = prior.plan.block
    if block == 1:
        return "skips whole blocks of scores, and these are cut one by one; apply the plan with block="
    if not fused:
        return "needs a fused attention, and the model computes this map itself, or others read it"
    if any(len(sizes(one.query)) != 4 or sizes(one.query)[1] != prior.heads for one in fused):
        return "needs queries of batch, heads, tokens and channels"
    blocks = block_sums(left.double(), block) > 0
    visible = blocks.repeat_interleave(block, -1).repeat_interleave(block, -2)[..., : left.shape[-2], : left.shape[-1]]
    if positions is not None:
        visible = visible & (positions <= torch.arange(left.shape[-2]).unsqueeze(-1))
    if not torch.equal(visible, left):
        return "skips blocks whose scores are all cut or all left, and here some are cut in part"
    return None
