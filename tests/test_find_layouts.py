"""Attention is found however it is written: by einsum, batched with its heads, key first, fused, with mixed heads."""

from __future__ import annotations

import math

import pytest
import torch

from .handwritten import Attention, find_in


class ByEinsum(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(p(x)) for p in (self.q, self.k, self.v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)


class ByEinsumWeights(torch.nn.Module):
    """Projections by einsum, one matrix for all three; values wider than keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = torch.nn.Parameter(torch.randn(2, 8, 2, 4))
        self.v = torch.nn.Parameter(torch.randn(8, 2, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (torch.einsum("btc,chd->bhtd", x, w) for w in self.qk)
        v = torch.einsum("btc,chd->bhtd", x, self.v)
        return torch.einsum("...ij,...jd", (q @ k.mT).softmax(-1), v)


class ByBmm(Attention):
    """Heads and batch in one axis, heads within the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(p(x)).transpose(1, 2).flatten(0, 1) for p in (self.q, self.k, self.v))
        probs = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
        return torch.bmm(probs, v).view(x.shape[0], self.heads, x.shape[1], -1).transpose(1, 2).flatten(2)


class HeadsOutside(Attention):
    """The batch within the heads: ``(H · B, T, T)``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(p(x)).permute(2, 0, 1, 3).flatten(0, 1) for p in (self.q, self.k, self.v))
        return torch.bmm((q @ k.transpose(1, 2)).softmax(-1), v)


class KeyFirst(Attention):
    """``K Qᵀ``, normalised over its first axis, and ``Vᵀ`` times it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(p(x)).transpose(1, 2) for p in (self.q, self.k, self.v))
        probs = (k @ q.transpose(-1, -2)).softmax(dim=-2)
        return v.transpose(-1, -2) @ probs


class KeyFirstCausal(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(p(x)).transpose(1, 2) for p in (self.q, self.k, self.v))
        at = torch.arange(x.shape[1])
        hidden = (at[:, None] > at[None, :])[None, None]
        return v.mT @ (k @ q.mT).masked_fill(hidden, -math.inf).softmax(dim=-2)


class HeadMask(Attention):
    """Everything that may happen to a map on its way to the values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(p(x)).transpose(1, 2) for p in (self.q, self.k, self.v))
        probs = torch.nn.functional.softmax(q @ k.mT, -1, dtype=torch.float64).to(x.dtype)
        probs = torch.nn.functional.dropout(probs, 0.1, self.training) * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
        return (probs.nan_to_num() @ v).transpose(1, 2).flatten(2)


class TalkingHeads(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(p(x)).transpose(1, 2) for p in (self.q, self.k, self.v))
        probs = (q @ k.mT).softmax(-1)
        return self.mix(probs.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


class Multiquery(Attention):
    """One head of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.split(self.q(x)).transpose(1, 2)
        return (q @ self.k(x)[:, None].mT).softmax(-1) @ self.v(x)[:, None]


class GroupedFused(Attention):
    def __init__(self) -> None:
        super().__init__(heads=4)
        self.k, self.v = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.split(self.q(x)).transpose(1, 2)
        k, v = (p(x).view(*x.shape[:2], 2, -1).transpose(1, 2) for p in (self.k, self.v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, None, 0.0, True, enable_gqa=True)


class Returned(Attention):
    """A map that is averaged and returned has one consumer all the same."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (self.split(p(x)).transpose(1, 2) for p in (self.q, self.k, self.v))
        probs = (q @ k.mT).softmax(-1)
        return probs @ v, probs.mean(1)


LAYOUTS: dict[type[torch.nn.Module], tuple[int, int, int, int, str]] = {
    ByEinsum: (2, 2, 4, 4, "none"),
    ByEinsumWeights: (2, 2, 4, 6, "none"),
    ByBmm: (2, 2, 4, 4, "none"),
    HeadsOutside: (2, 2, 4, 4, "none"),
    KeyFirst: (2, 2, 4, 4, "none"),
    KeyFirstCausal: (2, 2, 4, 4, "causal"),
    HeadMask: (2, 2, 4, 4, "none"),
    TalkingHeads: (2, 2, 4, 4, "none"),
    Multiquery: (2, 1, 4, 4, "none"),
    GroupedFused: (4, 2, 2, 2, "causal"),
    Returned: (2, 2, 4, 4, "none"),
}


@pytest.mark.parametrize("module", LAYOUTS)
def test_attention_in_any_layout(module: type[torch.nn.Module]) -> None:
    program, (site,) = find_in(module())
    assert (site.heads, site.kv_heads, site.head_dim, site.value_dim, site.mask) == LAYOUTS[module]
    assert (site.kind, site.bias) == ("self", "none")
    (x,) = program.graph.find_nodes(op="placeholder")
    batch, tokens = (size.node.expr for size in x.meta["val"].shape[:2])
    assert site.map_shape == (batch, site.heads, tokens, tokens)


def test_queries_and_keys_are_told_apart_when_the_key_comes_first() -> None:
    module = KeyFirst()
    program, (site,) = find_in(module)
    linear = {n.target: n for n in program.graph.nodes if n.op == "get_attr"}
    above = {site.nodes.query: "q.weight", site.nodes.key: "k.weight"}
    for operand, weight in above.items():
        reached, pending = set(), [program.node(str(operand))]
        while pending:
            reached.add(pending.pop())
            pending = [n for node in reached for n in node.all_input_nodes if n not in reached]
        assert linear[weight] in reached


class TwoConsumers(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.other = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, w = (self.split(p(x)).transpose(1, 2) for p in (self.q, self.k, self.v, self.other))
        probs = (q @ k.mT).softmax(-1)
        return probs @ v + (probs @ w).tanh()


def test_a_map_with_two_consumers_is_one_site() -> None:
    _, (site,) = find_in(TwoConsumers())
    assert len(set(site.nodes.contexts)) == len(set(site.nodes.values)) == 2


class Cross(Attention):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(y)
        q, k, v = self.split(self.q(x)), self.split(self.k(y)), self.split(self.v(y))
        return torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))


def test_keys_from_elsewhere_are_cross_attention() -> None:
    _, (site,) = find_in(Cross(), (3, 5, 8), (3, 7, 8))
    assert site.kind == "cross"
    assert site.map_shape[2] != site.map_shape[3]


def test_keys_from_an_encoder_of_the_same_tensor_are_cross_attention() -> None:
    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x, x)

    assert [site.kind for site in find_in(Both())[1]] == ["self", "self", "cross"]
