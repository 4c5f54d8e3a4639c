"""Attention in every form that the field writes it in, each as a small function of queries, keys and values.

A `Form` is a module of its own, so that many of them are captured as one model and told apart by their paths.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from .handwritten import Attention

Tensor = torch.Tensor
Function = Callable[["Form", Tensor], Tensor]


class Form(Attention):
    """Projections of 8 channels to two heads, and the attention of one function."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.qkv = torch.nn.Linear(8, 24)
        self.mix = torch.nn.Parameter(torch.randn(2, 2))
        self.pointwise = torch.nn.Conv2d(2, 2, 1)
        self.sinks = torch.nn.Parameter(torch.randn(2))
        self.table = torch.nn.Embedding(9, 2)
        self.place = torch.nn.Linear(8, 8)
        self.norm = torch.nn.LayerNorm(4)
        self.narrow = torch.nn.Linear(8, 4)
        self.wide = torch.nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as ``(batch, heads, tokens, channels)``."""
        q, k, v = (self.split(project(x)).transpose(1, 2) for project in (self.q, self.k, self.v))
        return q, k, v


class Forms(torch.nn.Module):
    """Many forms, each called with the same tokens."""

    def __init__(self, functions: list[Function]) -> None:
        super().__init__()
        self.forms = torch.nn.ModuleDict({function.__name__: Form(function) for function in functions})

    def forward(self, x: Tensor) -> list[Tensor]:
        return [form(x) for form in self.forms.values()]


# Where queries, keys and values come from.


def thirds(m: Form, x: Tensor) -> Tensor:
    q, k, v = (m.split(t).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
    return (q @ k.mT).softmax(-1) @ v


def interleaved(m: Form, x: Tensor) -> Tensor:
    """GPT-NeoX: the three of one head side by side."""
    q, k, v = m.qkv(x).view(*x.shape[:2], 2, 12).transpose(1, 2).split(4, -1)
    return (q @ k.mT).softmax(-1) @ v


def interleaved_channels(m: Form, x: Tensor) -> Tensor:
    """BLOOM: ``(heads, 3, channels)``."""
    qkv = m.qkv(x).view(*x.shape[:2], 2, 3, 4)
    q, k, v = (qkv[..., i, :].transpose(1, 2) for i in range(3))
    return (q @ k.mT).softmax(-1) @ v


def unbound(m: Form, x: Tensor) -> Tensor:
    """timm: ``reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)``."""
    q, k, v = m.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v)


def stacked_first(m: Form, x: Tensor) -> Tensor:
    qkv = m.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
    return (qkv[0] @ qkv[1].mT).softmax(-1) @ qkv[2]


def einops_style(m: Form, x: Tensor) -> Tensor:
    q, k, v = torch.einsum("btc,khdc->kbthd", x, m.qkv.weight.view(3, 2, 4, 8))
    return torch.einsum("bhij,bjhd->bihd", torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1), v)


def einsum_of_three(m: Form, x: Tensor) -> Tensor:
    """A factor for every head in the scores, and the output projection in the product with the values."""
    q, k, v = (m.split(p(x)) for p in (m.q, m.k, m.v))
    probs = torch.einsum("bihd,bjhd,h->bhij", q, k, m.sinks).softmax(-1)
    return torch.einsum("bhij,bjhd,hde->bie", probs, v, m.place.weight.view(2, 4, 8))


def einsum_of_one(m: Form, x: Tensor) -> Tensor:
    """A transposition written as an einsum."""
    q, k, v = (torch.einsum("bthd->bhtd", m.split(p(x))) for p in (m.q, m.k, m.v))
    return (q @ k.mT).softmax(-1) @ v


def tensordot(m: Form, x: Tensor) -> Tensor:
    """One sequence, one head."""
    q, k, v = m.q(x[0]), m.k(x[0]), m.v(x[0])
    return torch.tensordot(torch.tensordot(q, k, ([1], [1])).softmax(-1), v, 1)


def inner(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.q(x[0]), m.k(x[0]), m.v(x[0])
    return torch.mm(torch.inner(q, k).softmax(-1), v)


def one_key_head(m: Form, x: Tensor) -> Tensor:
    q = m.split(m.q(x)).transpose(1, 2)
    k, v = m.narrow(x), m.wide(x)
    return torch.einsum("bhij,bjd->bhid", torch.einsum("bhid,bjd->bhij", q, k).softmax(-1), v)


def wide_values(m: Form, x: Tensor) -> Tensor:
    q, k, _ = m.heads_of(x)
    return (q @ k.mT).softmax(-1) @ m.split(m.wide(x)).transpose(1, 2)


def normed(m: Form, x: Tensor) -> Tensor:
    """Norms of queries and keys: a layer norm, and unit length."""
    q, k, v = m.heads_of(x)
    return (m.norm(q) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v


def normed_by_hand(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    q, k = (t / (t * t).sum(-1, keepdim=True).sqrt() for t in (q, k))
    return (q @ k.mT).softmax(-1) @ v


def _halves(x: Tensor, at: Tensor) -> Tensor:
    one, other = x.chunk(2, -1)
    return x * at.cos() + torch.cat([-other, one], -1) * at.sin()


def rotary_halves(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    at = (torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1])).repeat(1, 2)
    return (_halves(q, at) @ _halves(k, at).mT).softmax(-1) @ v


def rotary_pairs(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    at = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1])
    turn = torch.polar(torch.ones_like(at), at)
    q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2) for t in (q, k))
    return (q @ k.mT).softmax(-1) @ v


def rotary_strided(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    at = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1])

    def turned(t: Tensor) -> Tensor:
        even, odd = t[..., ::2], t[..., 1::2]
        return torch.stack([even * at.cos() - odd * at.sin(), even * at.sin() + odd * at.cos()], -1).flatten(-2)

    return (turned(q) @ turned(k).mT).softmax(-1) @ v


# How the product is written.


def sums(m: Form, x: Tensor) -> Tensor:
    """Both products as a multiplication and a sum."""
    q, k, v = m.heads_of(x)
    scores = (q[..., :, None, :] * k[..., None, :, :]).sum(-1) / 2.0
    return (scores.softmax(-1)[..., None] * v[..., None, :, :]).sum(-2)


def sums_of_one_key_head(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.split(m.q(x)), m.narrow(x), m.wide(x)
    scores = (q[:, :, None] * k[:, None, :, None]).sum(-1)
    return (scores.softmax(2)[..., None] * v[:, None, :, None]).sum(2)


def batched_heads(m: Form, x: Tensor) -> Tensor:
    """fairseq: ``(T, B, C)`` to ``(B · H, T, D)``, products by bmm."""
    y = x.transpose(0, 1)
    q, k, v = (p(y).contiguous().view(-1, x.shape[0] * 2, 4).transpose(0, 1) for p in (m.q, m.k, m.v))
    probs = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
    return torch.bmm(probs, v).transpose(0, 1).contiguous().view(-1, x.shape[0], 8)


def scaled_by_baddbmm(m: Form, x: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in m.heads_of(x))
    at = torch.arange(x.shape[1], dtype=torch.float)
    slopes = (at * m.sinks[:, None, None]).repeat(x.shape[0], x.shape[1], 1)[: q.shape[0]]
    return torch.bmm(torch.baddbmm(slopes.expand(-1, x.shape[1], -1), q, k.mT, beta=1.0, alpha=0.5).softmax(-1), v)


def scaled_inside(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    return ((q * 4**-0.25) @ (k / math.sqrt(2.0)).mT).softmax(-1) @ v


def scaled_by_parameter(m: Form, x: Tensor) -> Tensor:
    """Swin v2: a learned scale for every head."""
    q, k, v = m.heads_of(x)
    return (q @ k.mT * m.sinks.clamp(max=2.0).exp()[:, None, None]).softmax(-1) @ v


def soft_capped(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    return (((q @ k.mT) / 50.0).tanh() * 50.0).softmax(-1) @ v


def relative_shift(m: Form, x: Tensor) -> Tensor:
    """Transformer-XL: a product with positions, skewed, and two biases in the queries."""
    q, k, v = m.heads_of(x)
    length = x.shape[1]
    p = m.split(m.place(torch.arange(2 * length - 1).float()[:, None].expand(-1, 8)[None])).transpose(1, 2)
    skewed = F.pad((q + m.mix[0, 0]) @ p.mT, (1, 0))
    skewed = skewed.reshape(x.shape[0], 2, 2 * length, length)[:, :, 1:].reshape(x.shape[0], 2, length, -1)
    return (((q + m.mix[0, 1]) @ k.mT + skewed[..., :length]) / 2.0).softmax(-1) @ v


def disentangled(m: Form, x: Tensor) -> Tensor:
    """DeBERTa: content to position and position to content, gathered."""
    q, k, v = m.heads_of(x)
    length = x.shape[1]
    at = torch.arange(length)
    distance = (at[:, None] - at[None, :]).clamp(-4, 3) + 4
    table = m.place.weight
    kp, qp = (m.split(p(table)[None]).transpose(1, 2) for p in (m.k, m.q))
    c2p = (q @ kp.mT).gather(-1, distance.expand(x.shape[0], 2, -1, -1))
    p2c = (k @ qp.mT).gather(-1, distance.expand(x.shape[0], 2, -1, -1)).mT
    return (q @ k.mT + c2p + p2c).softmax(-1) @ v


def mixed_before(m: Form, x: Tensor) -> Tensor:
    """Talking heads, before the softmax."""
    q, k, v = m.heads_of(x)
    return torch.einsum("bhij,gh->bgij", q @ k.mT, m.mix).softmax(-1) @ v


def mixed_before_by_linear(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    scores = F.linear((q @ k.mT).permute(0, 2, 3, 1), m.mix).permute(0, 3, 1, 2)
    at = torch.arange(x.shape[1])
    return scores.masked_fill(at[None, :] > at[:, None], -math.inf).softmax(-1) @ v


def mixed_before_by_convolution(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    return m.pointwise(q @ k.mT).softmax(-1) @ v


# How the map is made and what is done to it.


def exponentials(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    e = (q @ k.mT).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def exponentials_less_maximum(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    scores = q @ k.mT
    e = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return (e / (e.sum(-1, keepdim=True) + 1e-9)) @ v


def exponentials_masked(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    at = torch.arange(x.shape[1])
    scores = (q @ k.mT).masked_fill(at[None, :] > at[:, None], -math.inf)
    e = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    return (e * e.sum(-1, keepdim=True).reciprocal()) @ v


def exponentials_times_mask(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    at = torch.arange(x.shape[1])
    e = (q @ k.mT).exp() * (at[None, :] <= at[:, None])
    return (e / e.sum(-1, keepdim=True).clamp_min(1e-6)) @ v


def exponential_of_log_softmax(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    return (q @ k.mT).log_softmax(-1).exp() @ v


def exponential_less_logsumexp(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    scores = q @ k.mT
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def softmax_plus_one(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    e = (q @ k.mT).exp()
    return (e / (1.0 + e.sum(-1, keepdim=True))) @ v


def normalised_by_f_normalize(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    return F.normalize((q @ k.mT).exp(), p=1.0, dim=-1) @ v


def sink(m: Form, x: Tensor) -> Tensor:
    """gpt-oss: a logit for every head that takes part in the softmax and is dropped after it."""
    q, k, v = m.heads_of(x)
    scores = q @ k.mT
    scores = torch.cat([scores, m.sinks.view(1, 2, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    scores = scores - scores.max(-1, keepdim=True).values
    return scores.softmax(-1)[..., :-1] @ v


def suppressed(m: Form, x: Tensor) -> Tensor:
    """Weak attention suppression."""
    q, k, v = m.heads_of(x)
    probs = (q @ k.mT).softmax(-1)
    threshold = probs.mean(-1, keepdim=True) - 0.5 * probs.std(-1, keepdim=True)
    probs = probs.masked_fill(probs < threshold, 0.0)
    return F.dropout(probs / probs.sum(-1, keepdim=True), 0.1, m.training) @ v


def cast(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    probs = F.softmax((q @ k.mT).double(), -1, dtype=torch.float64)
    return F.dropout(probs, 0.1, m.training).to(v.dtype) @ v


def first_axis(m: Form, x: Tensor) -> Tensor:
    """``(keys, batch, heads, queries)``."""
    q, k, v = (m.split(p(x)) for p in (m.q, m.k, m.v))
    return torch.einsum("jbhi,bjhd->bihd", torch.einsum("bihd,bjhd->jbhi", q, k).softmax(0), v)


def inner_axis(m: Form, x: Tensor) -> Tensor:
    q, k, v = (m.split(p(x)) for p in (m.q, m.k, m.v))
    return torch.einsum("bijh,bjhd->bihd", torch.einsum("bihd,bjhd->bijh", q, k).softmax(2), v)


def three_consumers(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    probs = (q @ k.mT).softmax(-1)
    return probs @ v + (probs @ v.tanh()) * probs.diagonal(dim1=-2, dim2=-1)[..., None] + (probs @ x[:, None])[..., :4]


# Masks.


def chunked(m: Form, x: Tensor) -> Tensor:
    """Streaming: chunks of 4, one chunk of look-back, 2 frames of look-ahead."""
    q, k, v = m.heads_of(x)
    at = torch.arange(x.shape[1])
    start = at // 4 * 4
    keep = (at[None, :] >= start[:, None] - 4) & (at[None, :] < start[:, None] + 4 + 2)
    return F.scaled_dot_product_attention(q, k, v, keep)


def sliding(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    at = torch.arange(x.shape[1])
    keep = (at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - 3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=0.3)


def biased_table(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    at = torch.arange(x.shape[1])
    bias = m.table((at[None, :] - at[:, None]).clamp(-4, 4) + 4).permute(2, 0, 1)[None]
    return F.scaled_dot_product_attention(q, k, v, bias, 0.0, False)


def alibi(m: Form, x: Tensor) -> Tensor:
    q, k, v = m.heads_of(x)
    at = torch.arange(x.shape[1])
    slopes = torch.tensor([0.5, 0.25]).view(2, 1, 1)
    return (q @ k.mT - slopes * (at[None, :] - at[:, None]).abs()).softmax(-1) @ v


def both_masks(m: Form, x: Tensor) -> Tensor:
    """A float mask that a boolean one was made into, and the causal flag of a second call."""
    q, k, v = m.heads_of(x)
    at = torch.arange(x.shape[1])
    added = torch.zeros(x.shape[1], x.shape[1]).masked_fill(at[None, :] > at[:, None], -math.inf)
    once = (q @ k.mT + added).softmax(-1) @ v
    return once + F.scaled_dot_product_attention(q, k, v, is_causal=True)
