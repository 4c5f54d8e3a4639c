"""Shared weights with residuals on a trained model: the error of the fit against its rank, and training from it.

    python examples/residual_transformer.py                # about five minutes on one core
    python examples/residual_transformer.py --steps 100    # a quick look: a minute and a half
    python examples/residual_transformer.py --save benchmarks/results/residual_example.json

A character model is trained on the language reference that comes with Python (`pydoc_data.topics`, about 700 kB of
English and code); its last tenth is held out. Its layers then share weights in groups of three, with a residual each.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import fxreuse

RANKS = (1, 2, 4, 8, 16, 32)
LENGTH = 64
BATCH = 12


class Layer(nn.Module):
    """A pre-norm layer: causal self-attention and a feed-forward layer of width 4d."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = (
            projection(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        x = x + self.output(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class CharacterModel(nn.Module):
    """Predicts the next character."""

    def __init__(self, characters: int, dim: int = 96, layers: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, dim))
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, characters)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def read_text() -> tuple[Tensor, Tensor, int]:
    """The characters as numbers, for training and held out, and how many there are."""
    text = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    known = sorted(set(text))
    ids = torch.tensor([known.index(character) for character in text])
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:], len(known)


def batch(ids: Tensor, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(ids) - LENGTH - 1, (BATCH,), generator=generator)
    return torch.stack([ids[start : start + LENGTH + 1] for start in starts])


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(model: nn.Module, ids: Tensor, steps: int, rate: float = 2e-3) -> None:
    """Adam with a rate that falls linearly, on the same batches for every model."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - step / steps))
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(ids, generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def evaluate(model: nn.Module, ids: Tensor) -> float:
    """Bits for a character of held-out text."""
    generator = torch.Generator().manual_seed(2)
    losses = [float(loss_of(model, batch(ids, generator))) for _ in range(20)]
    return sum(losses) / len(losses) / math.log(2)


def plain_errors(model: nn.Module, record: fxreuse.Record, rank: int) -> float:
    """The error of the mean, the diagonal and the truncated SVD of what is left, without refinement.

    The diagonal may be taken before the SVD or after it; the better one counts.
    """
    off = {"before": 0.0, "after": 0.0}
    total = 0.0
    groups: dict[tuple[int, int], list[Tensor]] = {}
    for one in record.matrices:
        groups.setdefault((one.place, one.group), []).append(model.get_parameter(one.weight).detach().double().t())
    for weights in groups.values():
        mean = torch.stack(weights).mean(0)
        for weight in weights:
            total += float(weight.square().sum())
            for order in off:
                rest = weight - mean
                if order == "before":
                    rest.diagonal().zero_()
                left, values, right = torch.linalg.svd(rest, full_matrices=False)
                rest = rest - left[:, :rank] * values[:rank] @ right[:rank]
                rest.diagonal().zero_()
                off[order] += float(rest.square().sum())
    return math.sqrt(min(off.values()) / total)


def fitted_error(model: nn.Module, record: fxreuse.Record) -> float:
    """The error of all matrices together, from that of each."""
    sizes = [float(model.get_parameter(one.weight).detach().square().sum()) for one in record.matrices]
    off = sum(one.error**2 * size for one, size in zip(record.matrices, sizes, strict=True) if one.error is not None)
    return math.sqrt(off / sum(sizes))


def fit_table(model: nn.Module, held_out: Tensor, example: Tensor) -> list[dict[str, Any]]:
    """For each rank the errors of the fit and of the plain SVD, and what the fitted model predicts untrained."""
    rows = []
    for rank in RANKS:
        start = time.perf_counter()
        small = fxreuse.apply(model, f"residual k=3 r={rank} lowering=factored", example)
        seconds = time.perf_counter() - start
        record = fxreuse.describe(small)
        rows.append(
            {
                "rank": rank,
                "parameters": sum(parameter.numel() for parameter in small.parameters()),
                "fit": fitted_error(model, record),
                "plain": plain_errors(model, record, rank),
                "outputs": record.fits[0].output,
                "outputs, biases alone": record.fits[0].biases,
                "bits": evaluate(small, held_out),
                "seconds": seconds,
            }
        )
    return rows


def training_table(
    model: nn.Module, text: Tensor, held_out: Tensor, characters: int, steps: int, example: Tensor
) -> list[dict[str, Any]]:
    """Models trained for the same number of steps, from different starts."""
    plan = "residual k=3 r=16 lowering=factored"
    torch.manual_seed(3)
    fresh = CharacterModel(characters)
    starts = {
        "shared, from scratch": lambda: fxreuse.apply(fresh, "share k=3", example, copy=True),
        "shared + residuals, from scratch": lambda: fxreuse.apply(fresh, f"{plan} init=zero", example, copy=True),
        "shared + residuals, fitted to the trained model": lambda: fxreuse.apply(model, plan, example, copy=True),
    }
    rows = []
    trained: dict[str, nn.Module] = {}
    for name, start in starts.items():
        small = start()
        before = evaluate(small, held_out)
        train(small, text, steps)
        trained[name] = small
        rows.append(_row(name, small, before, held_out))
    warm = fxreuse.apply(trained["shared, from scratch"], "residual r=16 lowering=factored", example, copy=True)
    before = evaluate(warm, held_out)
    train(warm, text, steps)
    return [*rows, _row("shared + residuals, from the trained shared model (the paper's)", warm, before, held_out)]


def _row(name: str, model: nn.Module, before: float, held_out: Tensor) -> dict[str, Any]:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"start": name, "parameters": parameters, "before": before, "after": evaluate(model, held_out)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="training steps of each model")
    parser.add_argument("--save", type=Path, help="write the numbers to this file")
    given = parser.parse_args()
    torch.manual_seed(0)
    text, held_out, characters = read_text()
    model = CharacterModel(characters)
    example = batch(text, torch.Generator().manual_seed(0))[:, :-1]
    train(model, text, given.steps)
    found: dict[str, Any] = {
        "steps": given.steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bits": evaluate(model, held_out),
    }
    print(f"trained: {found['parameters']:,} parameters, {found['bits']:.3f} bits for a character of held-out text")
    found["fit"] = fit_table(model, held_out, example)
    print(tabulate(found["fit"], headers="keys", floatfmt=".4f"))
    save(found, given.save)
    found["training"] = training_table(model, text, held_out, characters, given.steps, example)
    print(tabulate(found["training"], headers="keys", floatfmt=".3f"))
    save(found, given.save)


def save(found: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
