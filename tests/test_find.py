"""Attentions are found by data flow: in public architectures, in odd layouts, and not where there is none."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

from fxreuse.attention import AttentionSites
from fxreuse.find import find
from fxreuse.frontend import load_program
from fxreuse.program import Program, module_stack

from .architectures import ARCHITECTURES

_TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = {"vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _ids(length: int = 11) -> torch.Tensor:
    return torch.randint(3, 99, (2, length))


def gemma2() -> tuple[torch.nn.Module, Any]:
    config = hf.Gemma2Config(num_key_value_heads=2, head_dim=8, sliding_window=4, **_TEXT, **_TINY)
    return hf.Gemma2Model(config), {"input_ids": _ids()}


def modernbert() -> tuple[torch.nn.Module, Any]:
    special = {"cls_token_id": 1, "sep_token_id": 2}
    config = hf.ModernBertConfig(local_attention=6, global_attn_every_n_layers=3, **special, **_TEXT, **_TINY)
    return hf.ModernBertModel(config), {"input_ids": _ids()}


def albert() -> tuple[torch.nn.Module, Any]:
    return hf.AlbertModel(hf.AlbertConfig(embedding_size=16, **_TEXT, **_TINY)), {"input_ids": _ids()}


def gpt_neox() -> tuple[torch.nn.Module, Any]:
    return hf.GPTNeoXModel(hf.GPTNeoXConfig(**_TEXT, **_TINY)), {"input_ids": _ids()}


def gpt_neo() -> tuple[torch.nn.Module, Any]:
    kinds = [[["global", "local"], 2]]
    sizes = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "intermediate_size": 64, "window_size": 4}
    return hf.GPTNeoModel(hf.GPTNeoConfig(attention_types=kinds, **sizes, **_TEXT)), {"input_ids": _ids()}


MODELS: dict[str, Callable[[], tuple[torch.nn.Module, Any]]] = {
    model.__name__: model for model in (gemma2, modernbert, albert, gpt_neox, gpt_neo)
}


@functools.cache
def sites_of(name: str) -> tuple[Program, AttentionSites]:
    if name in ARCHITECTURES:
        case = ARCHITECTURES[name]()
        model, inputs = case.model, case.inputs
    else:
        model, inputs = MODELS[name]()
    program = load_program(model.eval(), inputs)
    return program, find(program)


def summary(sites: AttentionSites) -> list[tuple[str, int, str, str, str, str]]:
    """One line for every stack: how many layers, and what all of them have in common."""
    lines = []
    for stack, layers in sites.stacks.items():
        heads, *other = {f"{s.heads}/{s.kv_heads}×{s.head_dim}/{s.value_dim}" for s in layers}
        assert not other
        common = (" | ".join(dict.fromkeys(getattr(s, field) for s in layers)) for field in ("kind", "mask", "bias"))
        lines.append((stack, len(layers), heads, *common))
    return lines


PLAIN = ("4/4×8/8", "self", "none", "none")
PADDED = ("4/4×8/8", "self", "padding", "none")

EXPECTED = {
    "bert_padded": [("encoder.layer.{i}·self", 4, *PADDED)],
    "gpt2_padded": [("h.{i}·self", 4, "4/4×8/8", "self", "causal+padding", "none")],
    "llama_dense": [("model.layers.{i}·self", 4, "4/2×8/8", "self", "causal", "none")],
    "t5_encoder_padded": [("encoder.block.{i}·self", 4, "4/4×8/8", "self", "padding", "relative position")],
    "bart_encoder": [
        ("encoder.layers.{i}·self", 4, *PADDED),
        ("decoder.layers.{i}·self", 4, "4/4×8/8", "self", "causal", "none"),
        ("decoder.layers.{i}·cross", 4, "4/4×8/8", "cross", "padding", "none"),
    ],
    "vit": [("layers.{i}·self", 4, *PLAIN)],
    "swin": [
        ("encoder.layers.0.blocks.{i}·self", 2, "2/2×8/8", "self", "none | fixed", "learned table"),
        ("encoder.layers.1.blocks.{i}·self", 4, "4/4×8/8", "self", "none | fixed", "learned table"),
    ],
    "hubert_padded": [("encoder.layers.{i}·self", 4, *PADDED)],
    "wavlm_padded": [("encoder.layers.{i}·self", 4, "4/4×8/8", "self", "padding", "gated relative position")],
    "conformer_relative": [("encoder.layers.{i}·self", 4, "4/4×8/8", "self", "none", "token-dependent position")],
    "conformer_rotary": [("encoder.layers.{i}·self", 4, *PLAIN)],
    "whisper_encoder": [("layers.{i}·self", 4, *PLAIN)],
    "torch_encoder_padded": [("layers.{i}·self", 4, *PADDED)],
    "gemma2": [("layers.{i}·self", 4, "4/2×8/8", "self", "causal+window | causal", "none")],
    "modernbert": [("layers.{i}·self", 4, "4/4×8/8", "self", "none | window", "none")],
    "albert": [("encoder.albert_layer_groups.0.albert_layers.0@{i}·self", 4, *PLAIN)],
    "gpt_neox": [("layers.{i}·self", 4, "4/4×8/8", "self", "causal", "none")],
    "gpt_neo": [("h.{i}·self", 4, "4/4×8/8", "self", "causal | causal+fixed", "none")],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_attention_of_an_architecture(name: str) -> None:
    _, sites = sites_of(name)
    assert summary(sites) == EXPECTED[name]
    assert sites.rejected == ()


@pytest.mark.parametrize("name", EXPECTED)
def test_the_nodes_of_a_site_are_in_the_graph_and_fit_together(name: str) -> None:
    program, sites = sites_of(name)
    known = {node.name: node for node in program.graph.nodes}
    for site in sites:
        nodes = site.nodes
        assert {nodes.map, nodes.query, nodes.key, *nodes.contexts, *nodes.values} <= known.keys()
        assert site.fused == (nodes.scores is None)
        assert len(nodes.contexts) == len(nodes.values) == 1
        assert site.layer_path in module_stack(known[nodes.map])
        batch, heads, queries, keys = site.map_shape
        if not site.fused:
            assert known[nodes.map].args[0].name == nodes.scores
            assert known[nodes.map].meta["val"].numel() == batch * heads * queries * keys


@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("gemma2", [0, 1, 0, 1]),
        ("modernbert", [0, 1, 1, 0]),
        ("swin", [0, 1, 0, 2, 0, 2]),
        ("gpt_neo", [0, 1, 0, 1]),
        ("bart_encoder", [0, 0, 0, 0, 1, 2, 1, 2, 1, 2, 1, 2]),
        ("llama_dense", [0, 0, 0, 0]),
        ("t5_encoder_padded", [0, 0, 0, 0]),
    ],
)
def test_masks_are_compared_by_their_values(name: str, masks: list[int]) -> None:
    numbers: dict[str, int] = {}
    assert [numbers.setdefault(site.mask_key, len(numbers)) for site in sites_of(name)[1]] == masks


def test_the_table_names_stack_mask_and_bias() -> None:
    text = str(sites_of("wavlm_padded")[1])
    assert "encoder.layers.{i}·self" in text
    assert "gated relative position" in text


class Attention(torch.nn.Module):
    """Attention by hand; subclasses write the two products in their own way."""

    def __init__(self, heads: int = 2, dim: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (torch.nn.Linear(dim, dim) for _ in range(3))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], self.heads, -1)


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


def find_in(module: torch.nn.Module, *shapes: tuple[int, ...]) -> tuple[Program, AttentionSites]:
    program = load_program(module.eval(), tuple(torch.randn(shape) for shape in shapes or ((3, 5, 8),)))
    return program, find(program)


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


class Biased(Attention):
    """Scores with a table, a product with positions, and masks of all sorts, in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(9, 2)
        self.place = torch.nn.Parameter(torch.randn(5, 4))
        self.position = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(p(x)).transpose(1, 2) for p in (self.q, self.k, self.v))
        at = torch.arange(5)
        table = self.table((at[None, :] - at[:, None]).clamp(-4, 4) + 4).permute(2, 0, 1)
        scores = (1.0 - keep[:, None, None, :]) * -1e9 + (q @ k.mT + q @ self.position(self.place).mT) / 2.0
        scores = torch.where(at[None, :] <= at[:, None], scores + table, -math.inf)
        return scores.softmax(-1) @ v


def test_masks_and_biases_are_told_apart() -> None:
    _, (site,) = find_in(Biased(), (3, 5, 8), (3, 5))
    assert site.mask == "causal+padding"
    assert sorted(site.bias.split(" + ")) == ["relative position", "token-dependent position"]


class Masked(Attention):
    """Two attentions in a row whose masks are written differently."""

    def __init__(self, masks: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]) -> None:
        super().__init__()
        self.masks = masks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1])
        for mask in self.masks:
            q, k, v = (self.split(p(x)).transpose(1, 2) for p in (self.q, self.k, self.v))
            x = (mask(q @ k.mT, at).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return x


def _where(s: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return torch.where(at[None, :] <= at[:, None], s, -math.inf)


def _fill(s: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return s.masked_fill(~(at[:, None] >= at[None, :]), torch.finfo(s.dtype).min)


def _window(size: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda s, at: s.masked_fill((at[None, :] - at[:, None]).abs() > size, -math.inf)


@pytest.mark.parametrize(
    ("masks", "same"),
    [
        ([_where, _fill], True),
        ([_window(4096), _window(4096)], True),
        ([_window(4096), _window(4095)], False),
        ([_where, _window(2)], False),
        ([_where, lambda s, at: s], False),
        ([lambda s, at: s + 0.5 * at, lambda s, at: s + at * 0.5], True),
        ([lambda s, at: s + 0.5 * at, lambda s, at: 2 * (s + 0.5 * at)], False),
    ],
)
def test_masks_are_equal_if_they_are_provably_so(masks: list[Any], same: bool) -> None:
    one, other = find_in(Masked(masks))[1]
    assert (one.mask_key == other.mask_key) == same


def test_a_key_is_the_same_in_every_capture() -> None:
    once, again = (find_in(Masked([_where, _window(3)]))[1] for _ in range(2))
    assert [site.mask_key for site in once] == [site.mask_key for site in again]


class TokenPooling(torch.nn.Module):
    """A weight for every token, and their weighted mean."""

    def __init__(self) -> None:
        super().__init__()
        self.score = torch.nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.score(x).softmax(1).mT @ x).squeeze(1)


class LearnedQuery(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.probe = torch.nn.Parameter(torch.randn(1, 1, 8))
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probe = self.probe.expand(x.shape[0], -1, -1)
        return self.attention(probe, x, x, need_weights=False)[0]


class LearnedSlots(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slots = torch.nn.Parameter(torch.randn(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.slots).softmax(1).mT @ x


class Router(torch.nn.Module):
    """A mixture of two experts, weighted by a product over the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(8, 2)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.gate(x).softmax(-1)
        return torch.einsum("bte,bted->btd", weights, torch.stack([e(x) for e in self.experts], 2))


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.mean(1)).softmax(-1)


class Gumbel(torch.nn.Module):
    """A soft choice from a codebook, as in a vector quantiser."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Linear(8, 6)
        self.codebook = torch.nn.Parameter(torch.randn(6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gumbel_softmax(self.logits(x), tau=2.0) @ self.codebook


class WrongAxis(Attention):
    """Normalised over queries, contracted over keys."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(p(x)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return (q @ k.mT).softmax(-2) @ v


class WithItself(Attention):
    """The product of a map with itself has no values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probs = (self.q(x) @ self.k(x).mT).softmax(-1)
        return probs @ probs


REJECTED = {
    TokenPooling: "a projection by parameters",
    LearnedQuery: "learned vectors, the same for every input",
    LearnedSlots: "a projection by parameters",
    Router: "a projection by parameters",
    Classifier: "no matrix product contracts it over its own axis",
    Gumbel: "a projection by parameters",
    WrongAxis: "over another axis than the one that it is normalised over",
    WithItself: "no matrix product contracts it over its own axis",
}


@pytest.mark.parametrize("module", REJECTED)
def test_a_softmax_that_is_no_attention_is_rejected_with_a_reason(module: type[torch.nn.Module]) -> None:
    program, sites = find_in(module())
    assert len(sites) == 0
    (rejected,) = sites.rejected
    assert REJECTED[module] in rejected.reason
    assert program.node(rejected.node).op == "call_function"
    assert str(rejected.reason) in str(sites)


def test_a_rejection_names_the_line_of_the_model() -> None:
    (rejected,) = find_in(Classifier())[1].rejected
    assert "test_find.py" in rejected.source
    assert rejected.source.endswith("return self.head(x.mean(1)).softmax(-1)")


def test_rejected_softmaxes_count_in_the_order_of_a_module_call() -> None:
    class Gated(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = x.softmax(-1)
            return torch.nn.functional.scaled_dot_product_attention(self.q(x * gate), self.k(x * gate), self.v(x))

    _, sites = find_in(Gated())
    assert [site.order for site in sites] == [1]
    assert len(sites.rejected) == 1


def test_a_model_without_attention_has_no_sites_and_no_rejections() -> None:
    _, sites = find_in(torch.nn.Linear(8, 8))
    assert len(sites) == len(sites.rejected) == 0
    assert "no attention found" in str(sites)
