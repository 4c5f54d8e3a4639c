"""Ways to write one attention: tiny, by hand, each with its own order of axes, masks and biases.

A form gets the layer (whose parameters make its scores), queries, keys and values (batch, tokens, heads · width) and a
bool mask (batch, tokens) of what is padding. It returns the context (batch, tokens, heads · width).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, WIDTH, LONGEST = 2, 4, 16
LOWEST = torch.finfo(torch.float32).min


class Layer(nn.Module):
    """Attention with a residual, and everything that some form makes scores of."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.table = nn.Parameter(torch.randn(HEADS, 2 * LONGEST))
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        self.u = nn.Parameter(torch.randn(HEADS, WIDTH))
        self.positions = nn.Linear(8, 8, bias=False)
        self.register_buffer("eight", torch.tensor(8.0), persistent=False)
        self.register_buffer("past", torch.ones(LONGEST, LONGEST).tril())

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return x + self.o(self.form(self, *self.project(x), padding))


Form = Callable[[Layer, Tensor, Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """Layers of one form."""

    def __init__(self, form: Form, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(form) for _ in range(layers))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, padding)
        return x

    def shared(self, x: Tensor, padding: Tensor) -> Tensor:
        """The model where every layer uses the first one's map: the reference."""
        leader = self.layers[0]
        query, key, _ = leader.project(x)
        for layer in self.layers:
            x = x + layer.o(leader.form(leader, query, key, layer.v(x), padding))
        return x


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)


def joined(context: Tensor) -> Tensor:
    return context.transpose(1, 2).flatten(2)


def one_head(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, WIDTH)).sum(2)


def product(q: Tensor, k: Tensor) -> Tensor:
    return heads(q) @ heads(k).mT / 2


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return joined(scores.softmax(-1) @ heads(v))


FORMS: dict[str, Form] = {}


def form(function: Form) -> Form:
    """Register a form under the name of its function."""
    FORMS[function.__name__] = function
    return function


@form
def masked_with_infinity(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return attend(product(q, k).masked_fill(padding[:, None, None], -torch.inf), v)


@form
def masked_with_the_lowest(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    hidden = torch.cat([padding[:1] | True, padding[1:]])  # the first sequence sees nothing: its maps are uniform
    scores = torch.where(hidden[:, None, None], LOWEST, product(q, k))
    return attend(scores, v)


@form
def masked_with_a_large_number(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    rows = padding[:, None, :, None] | padding[:, None, None]  # padded queries see nothing
    return attend(product(q, k).masked_fill(rows, -1e9), v)


@form
def zeroed_afterwards(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    hidden = padding[:, None, :, None] | padding[:, None, None]
    weights = product(q, k).masked_fill(hidden, LOWEST).softmax(-1).masked_fill(hidden, 0.0)
    return joined(weights @ heads(v))


@form
def cleaned_afterwards(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    hidden = padding[:, None, :, None] | padding[:, None, None]
    return joined(product(q, k).masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num() @ heads(v))


@form
def causal_by_a_triangle(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    past = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    return attend(product(q, k).masked_fill(~past, -torch.inf), v)


@form
def causal_by_a_buffer(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    tokens = q.shape[1]
    return attend(product(q, k).masked_fill(layer.past[:tokens, :tokens] == 0, -torch.inf), v)


@form
def a_window_and_padding(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    place = torch.arange(q.shape[1])
    near = (place[:, None] - place).abs() < 3
    scores = torch.where(near, product(q, k), LOWEST).masked_fill(padding[:, None, None], LOWEST)
    return attend(scores, v)


@form
def scaled_by_tensors(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    scores = heads(q) @ heads(k).mT / layer.eight * torch.full([], 3.0) / torch.tensor(1.5)
    return attend(scores, v)


@form
def cosine_with_a_temperature(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    scores = F.normalize(heads(q), dim=-1) @ F.normalize(heads(k), dim=-1).mT
    return attend(scores * layer.temperature.exp() + layer.table[:, : q.shape[1]][:, None], v)


@form
def scaled_by_keys(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return attend(product(q, k) * (1 + k.mean(-1)[:, None, None].square()), v)


@form
def heads_in_the_batch(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    query, key, value = (heads(part).flatten(0, 1) for part in (q, k, v))
    bias = layer.table[:, : q.shape[1]].repeat(q.shape[0], 1)[:, None]
    scores = torch.baddbmm(bias, query, key.mT, beta=0.5, alpha=0.3)
    return joined((scores.softmax(-1) @ value).unflatten(0, (-1, HEADS)))


@form
def heads_split_for_the_softmax(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """As in BLOOM: the product over B·H, mask and softmax over B × H, the context over B·H again."""
    query, key, value = (heads(part).flatten(0, 1) for part in (q, k, v))
    bias = layer.table[:, : q.shape[1]].repeat(q.shape[0], 1)[:, None]
    scores = torch.baddbmm(bias, query, key.mT, beta=1.0, alpha=0.5).view(-1, HEADS, q.shape[1], q.shape[1])
    weights = scores.masked_fill(padding[:, None, None], LOWEST).softmax(-1)
    return joined((weights.view(-1, *weights.shape[-2:]) @ value).view(-1, HEADS, q.shape[1], WIDTH))


@form
def einsum_heads_last(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    query, key, value = (part.unflatten(-1, (HEADS, WIDTH)) for part in (q, k, v))
    scores = torch.einsum("bqhc,bkhc->bqkh", query, key) + layer.table[:, : q.shape[1]].mT
    scores = scores.masked_fill(padding[:, None, :, None], -torch.inf)
    return torch.einsum("bqkh,bkhc->bqhc", scores.softmax(2), value).flatten(2)


@form
def einsum_tokens_first(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """As in XLNet: (tokens, batch, heads, width), and the map as (batch, heads, queries, keys)."""
    query, key, value = (part.transpose(0, 1).unflatten(-1, (HEADS, WIDTH)) for part in (q, k, v))
    content = torch.einsum("ibnd,jbnd->bnij", query + layer.u, key)
    place = torch.arange(q.shape[1])
    bias = layer.table[:, (place[:, None] - place) + LONGEST]
    scores = (content + bias) * 0.5 - 1e30 * padding[:, None, None].to(q.dtype)
    return torch.einsum("bnij,jbnd->ibnd", scores.softmax(3), value).flatten(2).transpose(0, 1)


@form
def keys_before_queries(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    scores = (heads(k) @ heads(q).mT / 2).masked_fill(padding[:, None, :, None], -torch.inf)
    return joined(scores.softmax(-2).mT @ heads(v))


@form
def transposed_after_the_product(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    weights = (heads(k) @ heads(q).mT / 2).permute(0, 1, 3, 2).softmax(-1)
    return (heads(v).mT @ weights.mT).permute(0, 3, 1, 2).flatten(2)


@form
def one_key_head_in_the_product(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """Multi-query: the query heads are a dimension of the queries alone."""
    key, value = one_head(k), one_head(v)
    scores = torch.einsum("bqhc,bkc->bhqk", q.unflatten(-1, (HEADS, WIDTH)), key) / 2
    scores = scores.masked_fill(padding[:, None, None], -torch.inf)
    return torch.einsum("bhqk,bkc->bqhc", scores.softmax(-1), value).flatten(2)


@form
def queries_of_all_heads_in_a_row(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """As in GPT-BigCode: (batch, tokens · heads, width) against one head of keys."""
    batch, tokens, _ = q.shape
    query, key, value = q.reshape(batch, tokens * HEADS, WIDTH), one_head(k), one_head(v)
    scores = (query @ key.mT / 2).view(batch, tokens, HEADS, tokens)
    weights = scores.masked_fill(padding[:, None, None], LOWEST).softmax(-1)
    return (weights.view(batch, tokens * HEADS, tokens) @ value).view(batch, tokens, -1)


@form
def grouped_in_five_dimensions(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """Key heads × query heads of each."""
    query = heads(q).unsqueeze(1)
    scores = torch.einsum("bgrqc,bgkc->bgrqk", query, heads(k).sum(1, True)) / 2 + layer.table[:, : q.shape[1]][:, None]
    return torch.einsum("bgrqk,bgkc->bqgrc", scores.softmax(-1), heads(v).sum(1, True)).flatten(2)


@form
def windows_with_a_mask(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """As in Swin: the mask is added with windows and batch apart."""
    batch, tokens, _ = q.shape
    query, key, value = (torch.stack([part, part.sin()], 1).flatten(0, 1) for part in (q, k, v))
    scores = product(query, key) + layer.table[:, :tokens][:, None]
    mask = torch.arange(2)[:, None, None] * torch.arange(tokens, dtype=q.dtype)
    scores = scores.view(batch, 2, HEADS, tokens, tokens) + mask[:, None]
    return attend(scores.view(-1, HEADS, tokens, tokens), value).unflatten(0, (batch, 2)).sum(1)


@form
def shifted_positions(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """As in a Conformer: the relative shift of a product with positions."""
    batch, tokens, _ = q.shape
    place = torch.arange(tokens - 1, -tokens, -1, dtype=q.dtype)[:, None] * torch.arange(1, 9, dtype=q.dtype).rsqrt()
    relative = layer.positions(place.sin()).view(-1, HEADS, WIDTH).permute(1, 2, 0)
    scores = (heads(q) + layer.u[:, None]) @ relative
    scores = F.pad(scores, (1, 0)).view(batch, HEADS, 2 * tokens, tokens)[:, :, 1:].reshape(batch, HEADS, tokens, -1)
    scores = ((heads(q) + layer.u[:, None]) @ heads(k).mT + scores[..., :tokens]) * 0.5
    return attend(scores.masked_fill(padding[:, None, None], -torch.inf), v)


@form
def disentangled(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """As in DeBERTa: content to position and position to content, gathered, in the batch of all heads."""
    batch, tokens, _ = q.shape
    query, key, value = (heads(part).flatten(0, 1) for part in (q, k, v))
    place = torch.arange(tokens)
    index = (place[:, None] - place + tokens).expand(batch * HEADS, -1, -1)
    table = layer.positions(layer.table.view(2, -1, 8)[0].repeat(16, 1)[: 2 * tokens]).view(-1, HEADS, WIDTH)
    table = table.transpose(0, 1).repeat(batch, 1, 1)
    bias = torch.gather(query @ table.mT, -1, index) + torch.gather(key @ table.mT, -1, index).mT
    scores = torch.bmm(query, key.transpose(-1, -2) / math.sqrt(12)) + bias / math.sqrt(12)
    scores = scores.view(-1, HEADS, tokens, tokens).masked_fill(padding[:, None, None], LOWEST)
    context = torch.bmm(scores.softmax(-1).view(-1, tokens, tokens), value)
    return context.view(batch, HEADS, tokens, -1).permute(0, 2, 1, 3).reshape(batch, tokens, -1)


@form
def two_consumers(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    weights = product(q, k).softmax(-1)
    return joined(weights @ heads(v)) * joined(weights @ heads(v.sin()))


@form
def wide_values(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    context = product(q, k).softmax(-1) @ torch.cat([heads(v), heads(v).sin()], -1)
    return joined(context[..., :WIDTH] * context[..., WIDTH:])


@form
def weighted_heads(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """Factors of heads, queries and keys behind the softmax."""
    place = torch.arange(1, q.shape[1] + 1, dtype=q.dtype)
    weights = product(q, k).softmax(-1) * torch.tensor([0.5, 2.0])[:, None, None] / place[:, None] * 3 * place
    return joined(weights @ heads(v))


@form
def with_a_sink(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """As in GPT-OSS: the score of a key without a value, and the largest score subtracted."""
    scores = product(q, k).masked_fill(padding[:, None, :, None] | padding[:, None, None], LOWEST)
    sink = layer.temperature.expand(q.shape[0], -1, q.shape[1], -1)
    scores = torch.cat([scores, sink], -1)
    weights = (scores - scores.max(-1, keepdim=True).values).softmax(-1)
    return joined(weights[..., :-1] @ heads(v))


@form
def with_a_sink_and_a_bias(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    scores = product(q, k) + layer.table[:, : q.shape[1]][:, None]
    scores = torch.cat([scores, layer.temperature.expand(q.shape[0], -1, q.shape[1], -1)], -1) * 0.7
    return joined(scores.softmax(-1)[..., :-1] @ heads(v))


@form
def with_stable_scores(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """As in CogView and LayoutLMv3."""
    scores = product(q, k).masked_fill(padding[:, None, None], LOWEST) / 4
    return attend((scores - scores.amax(-1, keepdim=True)) * 4, v)


@form
def exponentials_over_their_sum(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    scores = product(q, k) + layer.table[:, : q.shape[1]][:, None]
    powers = (scores - scores.amax(-1, keepdim=True)).exp().masked_fill(padding[:, None, None], 0.0)
    powers = powers * (torch.arange(q.shape[1]) != 1)
    return joined((powers / powers.sum(-1, keepdim=True)) @ heads(v))


@form
def exponentials_less_a_logarithm(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    scores = product(q, k).masked_fill(padding[:, None, None], -torch.inf)
    return joined((scores - scores.logsumexp(-1, keepdim=True)).exp() @ heads(v))


@form
def einsum_with_weights_of_heads(layer: Layer, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """Scores are weighted by head in the einsum that makes them, and the context is mixed over heads in its own."""
    query, key = (part.unflatten(-1, (HEADS, WIDTH)) for part in (q, k))
    scores = torch.einsum("bqhc,h,bkhc->bkhq", query, layer.temperature[:, 0, 0], key).permute(0, 2, 3, 1)
    weights = scores.masked_fill(padding[:, None, None], -torch.inf).softmax(-1)
    mixing = layer.past[:HEADS, :HEADS]
    return torch.einsum("bhqk,bhkc,hg->bqgc", weights, heads(v), mixing).flatten(2)
