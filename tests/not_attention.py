"""Softmaxes that are no attention, and one word of the reason why, each as a small function of tokens."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .recognised_forms import Form, Tensor


def pooling(m: Form, x: Tensor) -> Tensor:
    """A weight for every token, and their weighted sum."""
    return (m.narrow(x)[..., :1].softmax(1) * x).sum(1)


def pooling_with_heads(m: Form, x: Tensor) -> Tensor:
    weights = m.narrow(x).softmax(1)
    return torch.einsum("bth,btc->bhc", weights, x)


def pooling_of_attention(m: Form, x: Tensor) -> Tensor:
    """Behind the scores there is a product of tokens, but it is not what is normalised."""
    attended = (x @ x.mT).tanh() @ x
    return (attended + x).softmax(1).mT @ x


def statistics(m: Form, x: Tensor) -> Tensor:
    """Attentive statistics pooling."""
    weights = m.q(m.k(x).tanh()).softmax(1)
    mean = (weights * x).sum(1)
    return torch.cat([mean, ((weights * x * x).sum(1) - mean * mean).clamp(min=1e-6).sqrt()], -1)


def classes(m: Form, x: Tensor) -> Tensor:
    return m.wide(x).softmax(-1)


def contrast(m: Form, x: Tensor) -> Tensor:
    """CLIP: a product of tokens that nothing is contracted with."""
    return (m.q(x) @ m.k(x).mT).softmax(-1)


def routed(m: Form, x: Tensor) -> Tensor:
    """A mixture of the two best of four experts."""
    weights, chosen = m.narrow(x).softmax(-1).topk(2, -1)
    experts = torch.stack([p(x) for p in (m.q, m.k, m.v, m.place)], -2)
    picked = experts.gather(-2, chosen[..., None].expand(-1, -1, -1, 8))
    return (weights[..., None] * picked).sum(-2)


def routed_by_matrix(m: Form, x: Tensor) -> Tensor:
    """Soft MoE: tokens to slots and back, by two softmaxes over a projection."""
    logits = m.wide(x)
    slots = torch.einsum("bts,btc->bsc", logits.softmax(1), x)
    return torch.einsum("bts,bsc->btc", logits.softmax(2), m.v(slots))


def layers(m: Form, x: Tensor) -> Tensor:
    """SUPERB: a learned mixture of layers."""
    stacked = torch.stack([x, m.q(x), m.k(x), m.v(x)])
    return (m.mix.flatten().softmax(0)[:, None, None, None] * stacked).sum(0)


def layers_by_product(m: Form, x: Tensor) -> Tensor:
    stacked = torch.stack([x, m.q(x), m.k(x), m.v(x)], -1)
    return stacked @ m.mix.flatten().softmax(0)


def linear_attention(m: Form, x: Tensor) -> Tensor:
    """Efficient attention: softmaxes of queries over features and of keys over tokens."""
    q, k, v = m.heads_of(x)
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def gumbel(m: Form, x: Tensor) -> Tensor:
    return F.gumbel_softmax(m.narrow(x), hard=True) @ m.place.weight[:4]


def mixed_tokens(m: Form, x: Tensor) -> Tensor:
    """Synthesizer: the same mixture of tokens for every input."""
    return m.place.weight[:5, :5].softmax(-1) @ x


def mixed_tokens_by_factors(m: Form, x: Tensor) -> Tensor:
    return (m.place.weight[:5] @ m.q.weight[:5].mT).softmax(-1) @ x


def synthesised(m: Form, x: Tensor) -> Tensor:
    """Synthesizer: scores of a token are a projection of it."""
    return m.wide(m.q(x).relu())[..., :5].softmax(-1) @ x


def dynamic_convolution(m: Form, x: Tensor) -> Tensor:
    """A kernel of four taps for every token, normalised."""
    taps = F.pad(x, (0, 0, 3, 0)).unfold(1, 4, 1)
    return torch.einsum("btk,btck->btc", m.narrow(x).softmax(-1), taps)


def memory(m: Form, x: Tensor) -> Tensor:
    """Learned keys and values."""
    return (m.q(x) @ m.k.weight.mT).softmax(-1) @ m.v.weight


def slots(m: Form, x: Tensor) -> Tensor:
    """Slot attention: the slots compete for a token."""
    q, k = m.q(x[:, :3].tanh()), m.k(x)
    probs = (q @ k.mT).softmax(1)
    return (probs / probs.sum(-1, keepdim=True)) @ m.v(x)


def channels(m: Form, x: Tensor) -> Tensor:
    """Selective kernels: two branches weighed for every channel."""
    branches = torch.stack([m.q(x), m.k(x)], 1)
    weights = torch.stack([m.v(x.mean(1)), m.place(x.mean(1))], 1).softmax(1)
    return (branches * weights[:, :, None]).sum(1)


def routed_by_exponentials(m: Form, x: Tensor) -> Tensor:
    e = m.narrow(x).exp()
    weights = e / e.sum(-1, keepdim=True)
    return torch.einsum("bte,bted->btd", weights, torch.stack([p(x) for p in (m.q, m.k, m.v, m.place)], 2))


def additive(m: Form, x: Tensor) -> Tensor:
    """Bahdanau: an attention, but its scores are no product."""
    scores = m.narrow((m.q(x)[:, :, None] + m.k(x)[:, None]).tanh())[..., 0]
    return scores.softmax(-1) @ m.v(x)


def distances(m: Form, x: Tensor) -> Tensor:
    return (-torch.cdist(m.q(x), m.k(x))).softmax(-1) @ m.v(x)


def cross_covariance(m: Form, x: Tensor) -> Tensor:
    """XCiT: channels attend to channels."""
    q, k, v = m.heads_of(x)
    return (q.mT @ k).softmax(-1) @ v.mT


def exponentials_divided_later(m: Form, x: Tensor) -> Tensor:
    """No map is made: the values are summed before they are divided."""
    q, k, v = m.heads_of(x)
    e = (q @ k.mT).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


_PROJECTION = "a projection by parameters"
_NO_CONTRACTION = "no matrix product contracts it over its own axis"

#: Why each is none, as far as the reason has to say.
REASONS = {
    pooling: [_PROJECTION],
    pooling_with_heads: [_PROJECTION],
    classes: [_NO_CONTRACTION],
    contrast: [_NO_CONTRACTION],
    routed: [_NO_CONTRACTION],
    routed_by_matrix: [_PROJECTION, _PROJECTION],
    layers: [_NO_CONTRACTION],
    layers_by_product: ["not a product of queries and keys"],
    linear_attention: [_PROJECTION, _PROJECTION],
    gumbel: [_NO_CONTRACTION],
    mixed_tokens: ["not a product of queries and keys"],
    mixed_tokens_by_factors: ["of parameters alone"],
    synthesised: [_PROJECTION],
    dynamic_convolution: [_PROJECTION],
    memory: [_PROJECTION],
    slots: ["over another axis than the one that it is normalised over"],
    statistics: [_PROJECTION],
    channels: [_NO_CONTRACTION],
    routed_by_exponentials: [_PROJECTION],
    cross_covariance: ["channels attend to channels"],
    additive: ["sums of queries and keys"],
    distances: ["cdist"],
    exponentials_divided_later: ["before they are divided by their sum"],
    pooling_of_attention: ["a product with a map"],
}
