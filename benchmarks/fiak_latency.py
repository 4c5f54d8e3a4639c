"""What pruning by priors gains in time: DeiT-tiny, and the attention of a long sequence of which most blocks are cut.

    python benchmarks/fiak_latency.py                    # everything that benchmarks/results/ does not have yet
    python benchmarks/fiak_latency.py deit 32 --again    # one part at one batch, anew
    python benchmarks/fiak_latency.py long 256
    python benchmarks/fiak_latency.py --seconds=1 --tiny # whether it runs; nothing is written
    python benchmarks/tables.py                          # writes the tables in docs/fiak.md

Every cell is one interleaved run without gradients, of rounds in which nothing else ran; two threads. Weights and
priors are random: time does not depend on them. ``deit`` runs whole models, eager: the dense model as given, with
attention computed unfused, and with fused attention, against pruned ones. ``long`` runs one attention of six heads of
width 64 over 4,096 queries and keys: fused, with a mask, and over the blocks that are left, in both ways; FlexAttention
is compiled. ``kernel`` runs the fused kernel at several numbers of keys, which is where `passes/fill_keys.py` has its
constants from.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fxreuse
from fxreuse.cost_model import summarise
from fxreuse.frontend.load import load_program
from fxreuse.priors.block_attention import flex_attention_over_blocks, gathered_attention
from fxreuse.priors.selection import block_sums, select

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
sys.path[:0] = [str(ROOT), str(ROOT.parent / "examples")]

from models.deit import Attention, DeiT  # noqa: E402
from undisturbed import undisturbed  # noqa: E402

TINY = "--tiny" in sys.argv
BATCHES = (1, 32)
BLOCKS = (64, 128, 256)
KEYS = (138, 144, 152, 158, 160, 197, 208)
LENGTH = 512 if TINY else 4096
PRUNED = {"keys 30 %": (0.0, 0.3), "keys 20 %": (0.0, 0.2), "scores 70 %": (0.7, 0.0), "mixed 70 % / 20 %": (0.7, 0.2)}


class UnfusedAttention(Attention):
    """The same with its map written out, as the published code has it."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).flatten(2))


def deit() -> tuple[dict[str, torch.nn.Module], dict[str, dict[str, float]]]:
    """The models by name, and for each pruned one what it saves, as shares of the dense model's work."""
    torch.manual_seed(0)
    size = {"layers": 2, "dim": 32, "size": 64} if TINY else {}
    dense, given = DeiT(**size).eval(), DeiT(**size).eval()
    for module in given.modules():
        if type(module) is Attention:
            module.__class__ = UnfusedAttention
    pictures = torch.randn(2, 3, size.get("size", 224), size.get("size", 224))
    weighed = fxreuse.apply(dense, "fiak", pictures)
    for name, parameter in weighed.named_parameters():
        if name.endswith("prior"):
            torch.nn.init.normal_(parameter)
    models, savings = {"as given": given, "fused": dense}, {}
    work = summarise(load_program(dense, pictures)).at(B=1).macs
    for name, (scores, keys) in PRUNED.items():
        models[name] = pruned = fxreuse.prune(weighed, scores=scores, keys=keys)
        sites = fxreuse.describe(pruned).pruned
        found = summarise(pruned.program, pruned=sites).at(B=1)
        skipped = sum(site.skipped_share * site.scores_pruned for site in sites)
        skipped /= sum(site.scores_pruned for site in sites)
        savings[name] = {
            "executed": 1 - found.macs / work,
            "algorithmic": 1 - found.macs_algorithmic / work,
            "skipped": skipped,
        }
    return models, savings


def measure_deit(batch: int, seconds: float) -> dict[str, Any]:
    """Milliseconds, and how many times faster than the dense model as given and with fused attention."""
    models, savings = prepared_deit()
    pictures = torch.randn(batch, 3, 64, 64) if TINY else torch.randn(batch, 3, 224, 224)
    timings, dropped = undisturbed(
        {name: functools.partial(model, pictures) for name, model in models.items()}, rounds=31, seconds=seconds
    )
    cell: dict[str, Any] = {"batch": batch, "threads": torch.get_num_threads(), "torch": torch.__version__}
    cell |= {"rounds": len(timings["fused"].rounds), "dropped": dropped, "savings": savings}
    cell["ms"] = {name: 1e3 * timing.seconds.median for name, timing in timings.items()}
    for against in ("as given", "fused"):
        gains = {name: timings[name].speedup_over(timings[against]) for name in PRUNED}
        cell[f"over {against}"] = {name: [gain.median, gain.low, gain.high] for name, gain in gains.items()}
    return cell


@functools.cache
def prepared_deit() -> tuple[dict[str, torch.nn.Module], dict[str, dict[str, float]]]:
    """The models, made once."""
    return deit()


def measure_long(block: int, seconds: float) -> dict[str, Any]:
    """One attention of which 70 % of the blocks are cut, in milliseconds and times faster than fused."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 6, LENGTH, 64)
    everything = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    kept = select(torch.rand(1, LENGTH, LENGTH), everything, scores=0.7, block=block)
    blocks = block_sums(kept.scores.double(), block) > 0
    columns, counts = blocks.nonzero()[:, -1], (tuple((block * blocks[0].sum(-1)).tolist()),)
    pairs = 6 * int(kept.scores.sum())
    options = (None, 0.0, None, False, pairs)
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(~kept.scores[0], -torch.inf)
    run: dict[str, Callable[[], object]] = {
        "fused": lambda: F.scaled_dot_product_attention(query, key, value),
        "mask": lambda: F.scaled_dot_product_attention(query, key, value, mask),
        "gather": lambda: gathered_attention(query, key, value, *options, columns, counts, block),
        "flex": lambda: flex_attention_over_blocks(query, key, value, *options, blocks, block),
    }
    expected = run["mask"]()
    errors = {name: float((run[name]() - expected).abs().max()) for name in ("gather", "flex")}  # type: ignore[operator]
    timings, dropped = undisturbed(run, seconds=seconds)
    gains = {name: timings[name].speedup_over(timings["fused"]) for name in ("mask", "gather", "flex")}
    return {
        "block": block,
        "length": LENGTH,
        "kept": pairs / (6 * LENGTH**2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": len(timings["fused"].rounds),
        "dropped": dropped,
        "errors": errors,
        "ms": {name: 1e3 * timing.seconds.median for name, timing in timings.items()},
        "over fused": {name: [gain.median, gain.low, gain.high] for name, gain in gains.items()},
    }


def measure_kernel(batch: int, seconds: float) -> dict[str, Any]:
    """The fused kernel at DeiT-tiny's queries, nanoseconds a score: rows that fill its vectors and rows that do not."""
    queries = torch.randn(batch, 4, 197, 48)
    run: dict[str, Callable[[], object]] = {}
    for keys in KEYS:
        key, value = torch.randn(2, batch, 4, keys, 48)
        row, whole = torch.zeros(1, keys), torch.zeros(197, keys)
        for name, mask in (("no mask", None), ("one row", row), ("a mask", whole)):
            run[f"{keys} {name}"] = functools.partial(F.scaled_dot_product_attention, queries, key, value, mask)
    timings, dropped = undisturbed(run, seconds=seconds)
    scores = {name: 4 * batch * 197 * int(name.partition(" ")[0]) for name in run}
    return {
        "batch": batch,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": len(timings[next(iter(run))].rounds),
        "dropped": dropped,
        "ns": {name: 1e9 * timing.seconds.median / scores[name] for name, timing in timings.items()},
    }


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    seconds = next((float(word.partition("=")[2]) for word in sys.argv if word.startswith("--seconds=")), 40.0)
    numbers = [int(word) for word in words if word.isdigit()]
    path = RESULTS / "fiak_latency.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    torch.set_num_threads(2)
    for part, measure, values in (
        ("deit", measure_deit, BATCHES),
        ("long", measure_long, BLOCKS),
        ("kernel", measure_kernel, BATCHES),
    ):
        if part not in words and any(not word.isdigit() for word in words):
            continue
        for value in numbers or values:
            if f"{part} {value}" in found and "--again" not in sys.argv and not TINY:
                continue
            with torch.no_grad():
                cell = measure(value, seconds)
            print(json.dumps(cell), flush=True)
            if not TINY:
                found[f"{part} {value}"] = cell
                RESULTS.mkdir(exist_ok=True)
                path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
