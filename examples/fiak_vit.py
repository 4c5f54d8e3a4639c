"""FiAK on data that is at hand: a small ViT on scikit-learn's handwritten digits, a character model on Python's help.

    python examples/fiak_vit.py            # about two minutes on one core

A model is trained dense, and with priors on its keys; that one is pruned by them and fine-tuned. The numbers are of one
seed and a short training; `benchmarks/fiak_learning.py` has the whole table.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxreuse

sys.path.insert(0, str(Path(__file__).parent))

from models.deit import Block

CONTEXT = 48


class DigitTransformer(nn.Module):
    """Pictures (batch, 1, 8, 8) → logits (batch, 10): 49 overlapping patches of 2×2 and a class token, N = 50."""

    def __init__(self, dim: int = 32, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 2)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 50, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        patches = self.patches(pictures).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(patches.shape[0], -1, -1), patches), 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class CharacterLayer(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind its norm."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(context.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CharacterTransformer(nn.Module):
    """Characters (batch, length) → logits of the next ones (batch, length, characters); at most `CONTEXT` of them."""

    def __init__(self, characters: int, dim: int = 48, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, dim))
        self.layers = nn.Sequential(*(CharacterLayer(dim, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, characters)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.embedding(characters) + self.positions[: characters.shape[1]]
        return self.head(self.norm(self.layers(x)))


class Digits:
    """Scikit-learn's 1,797 handwritten digits: four fifths to learn from, one fifth to test on, alike in every run."""

    name, unit = "digits", "accuracy, %"

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        found = load_digits()
        order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
        pictures = (torch.tensor(found.images, dtype=torch.float32) / 16)[order].unsqueeze(1)
        labels = torch.tensor(found.target)[order]
        self.tested = len(labels) // 5
        self.train, self.test = (
            (pictures[part], labels[part]) for part in (slice(self.tested, None), slice(0, self.tested))
        )
        self.example = pictures[:2]

    def model(self) -> nn.Module:
        """A model with new weights."""
        return DigitTransformer()

    def batches(self, steps: int, seed: int) -> Iterator[Callable[[nn.Module], Tensor]]:
        """Losses of batches of 32, each picture shifted by up to one pixel."""
        generator = torch.Generator().manual_seed(seed)
        pictures, labels = self.train
        for _ in range(steps):
            chosen = torch.randint(len(labels), (32,), generator=generator)
            down, right = torch.randint(3, (2, 32), generator=generator)
            crops = F.pad(pictures[chosen], (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)
            shifted = crops[torch.arange(32), :, down, right]
            yield lambda model, x=shifted, y=labels[chosen]: F.cross_entropy(model(x), y)  # type: ignore[misc]

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """The share of the test pictures whose digit is told, in percent."""
        model.eval()
        pictures, labels = self.test
        return 100 * (model(pictures).argmax(-1) == labels).float().mean().item()


class Characters:
    """The texts of Python's `help`, which ship with it; the last tenth is to test on."""

    name, unit = "characters", "bits per character"

    def __init__(self) -> None:
        from pydoc_data import topics

        text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
        known = sorted(set(text))
        index = {character: place for place, character in enumerate(known)}
        codes = torch.tensor([index[character] for character in text])
        self.characters = len(known)
        cut = len(codes) * 9 // 10
        self.train, self.test = codes[:cut], codes[cut:]
        self.example = codes[: 2 * CONTEXT].reshape(2, CONTEXT)
        self.bigram_entropy = _bigram_entropy(codes, self.characters)

    def model(self) -> nn.Module:
        """A model with new weights."""
        return CharacterTransformer(self.characters)

    def batches(self, steps: int, seed: int) -> Iterator[Callable[[nn.Module], Tensor]]:
        """Losses of 24 pieces of text, as long as the context."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            starts = torch.randint(len(self.train) - CONTEXT - 1, (24,), generator=generator)
            pieces = self.train[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]
            yield lambda model, x=pieces: _bits(model, x) * math.log(2)  # type: ignore[misc]

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """The cross entropy on the test text, in bits per character."""
        model.eval()
        count = (len(self.test) - 1) // CONTEXT
        rows = torch.stack([self.test[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(count)])
        return sum(_bits(model, part).item() * len(part) for part in rows.split(128)) / count


def _bits(model: nn.Module, pieces: Tensor) -> Tensor:
    logits = model(pieces[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten()) / math.log(2)


def _bigram_entropy(codes: Tensor, characters: int) -> float:
    """How many bits the next character of a text takes for one who knows its pairs of characters, counted in it."""
    counts = torch.bincount(codes[:-1] * characters + codes[1:], minlength=characters**2).double()
    counts = counts.reshape(characters, characters)
    given = counts / counts.sum(1, keepdim=True).clamp_min(1)
    return float(-(counts / counts.sum() * given.clamp_min(1e-300).log2()).sum())


def fit(model: nn.Module, data: Digits | Characters, steps: int, seed: int, rate: float = 2e-3) -> nn.Module:
    """Train with Adam, the rate falling to zero as a cosine."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for loss_of in data.batches(steps, seed):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def main() -> None:
    torch.set_num_threads(1)
    for data, steps, scores, keys in ((Digits(), 500, 0.7, 0.2), (Characters(), 500, 0.4, 0.1)):
        torch.manual_seed(0)
        dense = fit(data.model(), data, steps, seed=0)
        torch.manual_seed(0)
        weighed = fit(fxreuse.apply(data.model(), "fiak", data.example), data, steps, seed=0)
        pruned = fxreuse.prune(weighed, scores=scores, keys=keys)
        before = data.evaluate(pruned)
        after = data.evaluate(fit(pruned, data, steps // 3, seed=1, rate=1e-3))
        print(f"{data.name} ({data.unit})")
        print(f"  dense                                  {data.evaluate(dense):.2f}")
        print(f"  with priors                            {data.evaluate(weighed):.2f}")
        print(f"  pruned, scores {scores}, keys {keys}           {before:.2f}")
        print(f"  pruned and fine-tuned                  {after:.2f}")
        if isinstance(data, Characters):
            print(f"  entropy of the text, given the character before: {data.bigram_entropy:.2f}")
        print(fxreuse.describe(pruned))


if __name__ == "__main__":
    main()
