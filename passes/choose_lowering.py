"""``lowering=auto``: which lowering a stack gets, from its device, its sizes and the memory there is."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence

import sympy
import torch

from fxreuse.attention import AttentionSite
from fxreuse.errors import UnsupportedError
from fxreuse.program import Program
from fxreuse.tree import reads

from .arrange import UnclearAxes
from .fused import Fused
from .materialize import Materializer
from .recompute import Recomputer

# What a CPU does for one element of a map, in the time of one multiply-accumulate of a matrix product. Measured with
# two threads of a server CPU with AVX-512; benchmarks/reuse_latency.py shows what comes of it.
_SOFTMAX = 24  # exponential, sum, quotient; and what it takes to write the element
_READ = 9  # to read an element of a stored map, where that takes longer than its product
_FUSED = 0.8  # a multiply-accumulate inside the fused kernel, whose operands stay in cache
# The fused kernel skips blocks of this many queries and keys that a causal mask hides whole.
_BLOCK = 512
# A map that takes a larger part of the memory than this is not stored.
_LARGEST_PART = 0.25

_LOWERINGS: dict[str, Callable[[Program], Materializer | Recomputer]] = {
    "materialize": Materializer,
    "recompute": Recomputer,
}


def choose_lowering(program: Program, sites: Sequence[AttentionSite], leaders: Sequence[int]) -> tuple[str, str]:
    """The lowering of a stack, and the reason for the record.

    Batch and lengths are free in the graph, and the choice is made once. So on a CPU the map is stored where that costs
    less at every length, and not only at the example's: everywhere but under a causal mask, where the fused kernel
    skips half of a long map. The example's sizes decide whether a map is small enough to be stored. On an accelerator
    the map is stored where the model has it in memory anyway. Where this choice is refused, it is the other one.

    Arguments:
        program: the program as it is before the pass; it is not changed.
        sites: the sites of the stack, by layer.
        leaders: for every layer, the layer whose map it uses.

    Returns:
        ``"materialize"`` or ``"recompute"``, and why.
    """
    chosen, reason = _prefer(program, sites, leaders)
    refused = _refusal(program, sites, leaders, chosen)
    if refused is None:
        return chosen, reason
    other = "recompute" if chosen == "materialize" else "materialize"
    if _refusal(program, sites, leaders, other) is not None:
        return chosen, reason
    return other, f"{reason}, but {chosen} is refused here: {refused}"


def _prefer(program: Program, sites: Sequence[AttentionSite], leaders: Sequence[int]) -> tuple[str, str]:
    device = next((tensor.device for tensor in reads(program).values()), torch.device("cpu"))
    leading = [site for site, leader in zip(sites, leaders, strict=True) if site is sites[leader]]
    sizes, size = max(
        ((_example(program, site), _map_bytes(program, site)) for site in leading), key=lambda pair: pair[1]
    )
    memory = _memory(device)
    stored = f"a map takes {_readable(size)} at the example's sizes ({'×'.join(map(str, sizes))})"
    if memory is not None and size > _LARGEST_PART * memory:
        part = f"more than a quarter of the {_readable(memory)} of {device.type}"
        return "recompute", f"{stored}, {part}, and is not stored"
    if device.type not in ("cpu", "meta"):
        if leading[0].fused:
            return "recompute", f"on {device.type} the fused kernel needs no map in memory"
        return "materialize", f"the model computes this map unfused; {stored}"
    return _cheaper_on_cpu(program, sites, leaders, stored)


def _cheaper_on_cpu(
    program: Program, sites: Sequence[AttentionSite], leaders: Sequence[int], stored: str
) -> tuple[str, str]:
    work = _Work(0.0, 0.0)
    causal = False
    for layer, leader in enumerate(leaders):
        if leaders.count(leader) > 1:
            visible = _visible(program, sites[leader])
            causal |= visible < 1
            work += _Work.of(sites[layer], layer == leader, visible)
    where = "half of a long causal map, which the fused kernel skips" if causal else "any length"
    costs = f"{work.materialize:.0f} MACs' time per element against {work.recompute:.0f}"
    if work.materialize <= work.recompute:
        return "materialize", f"on a CPU a stored map costs less than computing it again at {where} ({costs}); {stored}"
    return "recompute", f"on a CPU a stored map costs more than computing {where} ({costs})"


@dataclasses.dataclass(frozen=True)
class _Work:
    """What the attentions of a stack cost per element of a map, in the time of multiply-accumulates."""

    materialize: float
    recompute: float

    @staticmethod
    def of(site: AttentionSite, leads: bool, visible: float) -> _Work:
        """Of one layer, of whose map the fused kernel computes the part ``visible``."""
        product = max(site.value_dim, _READ)
        stored = product + (site.head_dim + _SOFTMAX if leads else 0)
        return _Work(stored, visible * (_FUSED * (site.head_dim + site.value_dim) + _SOFTMAX))

    def __add__(self, other: _Work) -> _Work:
        return _Work(self.materialize + other.materialize, self.recompute + other.recompute)


def _visible(program: Program, leader: AttentionSite) -> float:
    """The smallest part of a map that the fused kernel computes at any length that the graph takes."""
    if not leader.fused or not Fused.of(program.node(leader.nodes.map)).is_causal:
        return 1.0
    length = leader.map_shape[-1]
    return min(1.0, 0.5 + _BLOCK / (2 * length)) if isinstance(length, int) else 0.5


def _refusal(program: Program, sites: Sequence[AttentionSite], leaders: Sequence[int], lowering: str) -> str | None:
    """Why a lowering cannot express a stack; None where it can."""
    trial = _LOWERINGS[lowering](program.copy())
    try:
        for layer, site in enumerate(sites):
            followers = [sites[other] for other, leader in enumerate(leaders) if leader == layer != other]
            if followers:
                trial.share(site, followers)
    except (UnsupportedError, UnclearAxes) as refusal:
        return str(refusal)
    return None


def _example(program: Program, site: AttentionSite) -> tuple[int, ...]:
    """The sizes of a map for the example inputs."""
    free = [
        size
        for node in program.graph.find_nodes(op="placeholder")
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt)
    ]
    hints = {size.node.expr: sympy.Integer(size.node.hint) for size in free}
    return tuple(int(sympy.sympify(size).xreplace(hints)) for size in site.map_shape)


def _map_bytes(program: Program, site: AttentionSite) -> int:
    return torch.Size(_example(program, site)).numel() * program.node(site.nodes.map).meta["val"].element_size()


def _memory(device: torch.device) -> int | None:
    """The bytes of memory that a device has; None where it does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _readable(size: float) -> str:
    """Bytes for people: ``4.0 MiB``."""
    power = min(int(math.log(max(size, 1), 1024)), 3)
    return f"{size / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}"
