"""``lowering=auto``: which lowering a stack gets, from its device, its sizes and the memory there is."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import sympy
import torch

from fxreuse.attention import AttentionSite
from fxreuse.cost_model.attention_time import SharedMap
from fxreuse.cost_model.device import Device
from fxreuse.program import Program
from fxreuse.tree import reads

from .fused import Fused
from .meant_for import intended

# Lengths that stand for those that are free in the graph.
_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
# Two predictions that are this near are alike; the map is stored then, which has fewer multiply-accumulates.
_ALIKE = 1.05
_WAYS = ("storing the map", "computing it again")
# A map that takes a larger part of the memory than this is not stored.
_LARGEST_PART = 0.25


def choose_lowering(program: Program, sites: Sequence[AttentionSite], leaders: Sequence[int]) -> tuple[str, str]:
    """The lowering of a stack, and the reason for the record.

    On a CPU the cost model predicts what the attentions take in both (`cost_model.attention_time`), on this machine if
    it has been measured, and otherwise on a typical one. Batch and lengths are free in the graph, and the choice is
    made once: it is the lowering that loses least where it loses most, over lengths from 128 to 4096. The example's
    sizes decide whether a map is small enough to be stored. On an accelerator the map is stored where the
    model has it in memory anyway. The device is that of the model, or the one that is meant (`meant_for`). Whether the
    lowering can express the stack is not asked here: `reuse` takes the other one where this one is refused.

    Arguments:
        program: the program as it is before the pass; it is not changed.
        sites: the sites of the stack, by layer.
        leaders: for every layer, the layer whose map it uses.

    Returns:
        ``"materialize"`` or ``"recompute"``, and why.
    """
    device = next((tensor.device for tensor in reads(program).values()), torch.device("cpu"))
    leading = [site for site, leader in zip(sites, leaders, strict=True) if site is sites[leader]]
    sizes, size = max(
        ((_example(program, site), _map_bytes(program, site)) for site in leading), key=lambda pair: pair[1]
    )
    meant = intended()
    kind, called = (device.type, device.type) if meant is None else (meant.kind, meant.name)
    memory = _memory(device) if kind == device.type else None
    stored = f"a map takes {_readable(size)} at the example's sizes ({'×'.join(map(str, sizes))})"
    if memory is not None and size > _LARGEST_PART * memory:
        part = f"more than a quarter of the {_readable(memory)} of {device.type}"
        return "recompute", f"{stored}, {part}, and is not stored"
    if kind not in ("cpu", "meta"):
        if leading[0].fused:
            return "recompute", f"on {called} the fused kernel needs no map in memory"
        return "materialize", f"the model computes this map unfused; {stored}"
    return _cheaper_on_cpu(program, sites, leaders, meant or Device.typical_cpu(), stored)


def _cheaper_on_cpu(
    program: Program, sites: Sequence[AttentionSite], leaders: Sequence[int], device: Device, size: str
) -> tuple[str, str]:
    times = {}
    for length in _lengths(sites[leaders[0]]):
        groups = [
            _shared_map(program, sites, layers, length)
            for leader in set(leaders)
            if len(layers := [layer for layer, own in enumerate(leaders) if own == leader]) > 1
        ]
        times[length] = (
            sum(group.stored(device) for group in groups),
            sum(group.computed_again(device) for group in groups),
        )
    losses = [max(pair[which] / min(pair) for pair in times.values()) for which in (0, 1)]
    best = 0 if losses[0] <= losses[1] * _ALIKE else 1
    shown = (
        f"{_milliseconds(stored)} ms against {_milliseconds(again)} at {n}" for n, (stored, again) in times.items()
    )
    costs = f"predicted for {device.name}, stored against computed again: {', '.join(shown)}"
    if losses[best] <= _ALIKE:
        reason = f"{_WAYS[best]} takes no longer at any length"
    else:
        worst, other = losses[best], losses[1 - best]
        reason = f"{_WAYS[best]} takes up to {worst:.1f} times as long, {_WAYS[1 - best]} up to {other:.1f} times"
    return ("materialize", "recompute")[best], f"on a CPU {reason} ({costs}); {size}"


def _lengths(site: AttentionSite) -> list[int]:
    """The lengths that a choice has to suit: that of the map where it is fixed, and many where it is free."""
    length = site.map_shape[-1]
    if fixed := _number(length):
        return [fixed]
    return list(_LENGTHS)


def _shared_map(program: Program, sites: Sequence[AttentionSite], layers: Sequence[int], length: int) -> SharedMap:
    """The map of a group, where lengths that are free have this value, and there is one sample."""
    leader = sites[layers[0]]
    *_, queries, keys = leader.map_shape
    fused = Fused.of(program.node(leader.nodes.map)) if leader.fused else None
    return SharedMap(
        heads=leader.heads,
        queries=_number(queries) or length,
        keys=_number(keys) or length,
        width=leader.head_dim,
        values=leader.value_dim,
        layers=len(layers),
        causal=fused is not None and fused.is_causal,
        masked=fused is not None and fused.mask is not None,
    )


def _number(size: object) -> int | None:
    """A size as a number; None where it is free."""
    found = sympy.sympify(size)
    return int(found) if found.is_Integer else None


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


def _milliseconds(seconds: float) -> str:
    """Two digits at least: ``0.42``, ``5.9``, ``340``."""
    return f"{1e3 * seconds:.2g}" if seconds < 0.01 else f"{1e3 * seconds:.0f}"


def _readable(size: float) -> str:
    """Bytes for people: ``4.0 MiB``."""
    power = min(int(math.log(max(size, 1), 1024)), 3)
    return f"{size / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}"
