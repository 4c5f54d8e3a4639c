"""Attention-map reuse on a CPU: whole models in both lowerings, the kernels they are made of, and peak memory.

    python benchmarks/reuse_latency.py                      # everything that benchmarks/results/ does not have yet
    python benchmarks/reuse_latency.py plain 2048 --again   # one model at one length, anew
    python benchmarks/reuse_latency.py kernels | memory
    python benchmarks/reuse_latency.py plain --prepare      # captures only; the timings then start at once
    python benchmarks/tables.py                             # writes the tables in docs/measurements.md

Every cell is one interleaved run in eager mode without gradients; weights are random. Two threads by the clock; with
``--one-thread``, one thread by its processor time, for a machine that others use, too.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxreuse
from fxreuse.checking.measure import peak_memory
from fxreuse.map_workspace import attention_map

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
ONE_THREAD = "reuse_latency_one_thread"
PREPARED = Path(tempfile.gettempdir()) / "fxreuse_reuse_latency"
sys.path[:0] = [str(ROOT), str(ROOT.parent / "examples")]

from models.conformer import Conformer, RelativeAttention, shift  # noqa: E402
from undisturbed import processor_time, undisturbed  # noqa: E402

LENGTHS = (128, 256, 512, 768, 1024, 2048)
KERNEL_LENGTHS = (512, 1024, 2048, 4096)
LOWERINGS = ("materialize", "recompute")


class FusedRelativeAttention(RelativeAttention):
    """As `RelativeAttention`, with the position scores as the mask of a fused attention."""

    def forward(self, x: Tensor, distances: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = (self.split(projection(x)) for projection in (self.query, self.key, self.value))
        position = shift((q + self.v[:, None]) @ self.split(self.position(distances)).transpose(-1, -2))
        context = F.scaled_dot_product_attention(q + self.u[:, None], k, v, position * q.shape[-1] ** -0.5)
        return self.dropout(self.output(context.transpose(1, 2).flatten(2)))


class PlainLayer(nn.Module):
    """A pre-norm encoder layer: self-attention, then a feed-forward layer of width 4d."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = (
            projection(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        x = x + self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norm2(x))


def frames(length: int) -> tuple[Tensor]:
    return (torch.randn(1, length, 256),)


def bert_inputs(length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, 1000, (1, length))}


Case = tuple[str, dict[str, nn.Module], Callable[[int], Any], str]


def conformer() -> Case:
    given = Conformer().eval()
    fused = Conformer().eval()
    fused.load_state_dict(given.state_dict())
    for module in fused.modules():
        if type(module) is RelativeAttention:
            module.__class__ = FusedRelativeAttention
    return "Conformer-M", {"given": given, "fused": fused}, frames, "4x4"


def bert() -> Case:
    import transformers

    config = transformers.BertConfig(max_position_embeddings=max(LENGTHS))
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    return "BERT-base", {"fused": model}, bert_inputs, "4x3"


def plain() -> Case:
    model = nn.Sequential(*(PlainLayer(256, 4) for _ in range(16))).eval()
    return "plain, d = 256", {"fused": model}, frames, "4x4"


CASES: dict[str, Callable[[], Case]] = {"conformer": conformer, "bert": bert, "plain": plain}


def call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def prepare(name: str) -> tuple[str, dict[str, nn.Module], str, fxreuse.Decision]:
    """The variants of a model; kept in a file, since capturing them takes longer than timing."""
    PREPARED.mkdir(exist_ok=True)
    path = PREPARED / f"{name}.pt"
    if not path.exists():
        torch.manual_seed(0)
        title, models, make, plan = CASES[name]()
        original = next(iter(models.values()))
        for lowering in LOWERINGS:
            models[lowering] = fxreuse.apply(original, f"{plan} lowering={lowering}", make(16))
        automatic = fxreuse.describe(fxreuse.apply(original, plan, make(16))).decisions[0]
        torch.save((title, models, plan, automatic), path)
    return torch.load(path, weights_only=False)


def measure_models(name: str, lengths: list[int], results: str, seconds: float) -> None:
    """Time the original, as given and fused, against both lowerings; ``auto`` is one of them."""
    found = load(results)
    title, models, plan, automatic = prepare(name)
    make = bert_inputs if name == "bert" else frames
    for length in lengths:
        inputs = make(length)
        run = {kind: functools.partial(call, model, inputs) for kind, model in models.items()}
        if results == ONE_THREAD:
            timings, dropped = processor_time(run, seconds=seconds), 0
        else:
            timings, dropped = undisturbed(run, seconds=seconds)
        cell: dict[str, Any] = {
            "case": name,
            "model": title,
            "plan": plan,
            "length": length,
            "auto": automatic.lowering,
        }
        cell["reason"] = automatic.reason
        cell |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        cell |= {"rounds": len(timings["fused"].rounds), "dropped": dropped}
        cell["ms"] = {kind: 1e3 * timing.seconds.median for kind, timing in timings.items()}
        for against in ("given", "fused"):
            if against in timings:
                gains = {kind: timings[kind].speedup_over(timings[against]) for kind in LOWERINGS}
                cell[f"over {against}"] = {kind: [g.median, g.low, g.high] for kind, g in gains.items()}
        found[f"{title}, T = {length}"] = cell
        print(json.dumps(cell), flush=True)
        save(results, found)


def measure_kernels(length: int) -> dict[str, float]:
    """One attention of 4 heads of width 64, in milliseconds: fused, and the parts that reuse takes it into."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, length, 4, 64).transpose(2, 3)
    scale = 64**-0.5
    kept = attention_map(query, key, None, False, scale).clone()
    narrow = kept.to(torch.bfloat16)
    run: dict[str, Callable[[], object]] = {
        "fused": lambda: F.scaled_dot_product_attention(query, key, value),
        "map, fresh": lambda: torch.softmax((query * scale) @ key.transpose(-2, -1), -1),
        "map": lambda: attention_map(query, key, None, False, scale),
        "map, bf16": lambda: attention_map(query, key, None, False, scale, True, torch.bfloat16),
        "leader": lambda: attention_map(query, key, None, False, scale) @ value,
        "follower": lambda: kept @ value,
        "follower, bf16": lambda: (narrow @ value.to(torch.bfloat16)).type_as(value),
    }
    timings, dropped = undisturbed(run)
    found = {name: 1e3 * timing.seconds.median for name, timing in timings.items()}
    return found | {"rounds": len(timings["fused"].rounds), "dropped": dropped}


def measure_memory(length: int) -> dict[str, Any]:
    """The most bytes that a call of two plain layers holds, and the size of the map."""
    torch.manual_seed(0)
    model = nn.Sequential(PlainLayer(256, 4), PlainLayer(256, 4)).eval()
    inputs = torch.randn(1, length, 256)
    row: dict[str, Any] = {"length": length, "map": 4 * 4 * length**2}
    row["original"] = peak_memory(lambda: model(inputs))
    for options in ("recompute", "recompute values=2", "materialize", "materialize values=2"):
        small = fxreuse.apply(model, f"2x1 lowering={options}", torch.randn(1, 16, 256))
        row[options] = peak_memory(lambda small=small: small(inputs))
    return row


def load(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save(name: str, found: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    again = "--again" in sys.argv
    seconds = next((float(word.partition("=")[2]) for word in sys.argv if word.startswith("--seconds=")), 30.0)
    lengths = [int(word) for word in words if word.isdigit()]
    parts = [word for word in words if not word.isdigit()] or [*CASES, "kernels", "memory"]
    results = ONE_THREAD if "--one-thread" in sys.argv else "reuse_latency"
    torch.set_num_threads(1 if results == ONE_THREAD else 2)
    with torch.no_grad():
        for part in parts:
            if "--prepare" in sys.argv:
                if part in CASES:
                    prepare(part)
            elif part in CASES:
                found = load(results)
                known = [] if again else [cell["length"] for cell in found.values() if cell["case"] == part]
                wanted = [length for length in lengths or LENGTHS if length not in known]
                if wanted:
                    measure_models(part, wanted, results, seconds)
            else:
                name, function = f"reuse_{part}", {"kernels": measure_kernels, "memory": measure_memory}[part]
                found = load(name)
                for length in lengths or (KERNEL_LENGTHS if part == "kernels" else (4096,)):
                    if again or str(length) not in found:
                        found[str(length)] = function(length)
                        print(length, found[str(length)], flush=True)
                        save(name, found)


if __name__ == "__main__":
    main()
