"""What reuse means, said a second time and independently: the original module, run eagerly, with shared maps.

Nothing here knows of graphs. The original `forward` runs as it always does, under a `TorchFunctionMode` that sees
every softmax and every fused attention, and under module hooks that know which module call is running. A follower
gets the map of its leader, the softmax's value before dropout, and keeps its own values and its own dropout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional as F

from ..errors import UnsupportedError
from ..frontend.interception import Intercept, RunningModules, SiteKey


def site_key(name: str) -> SiteKey:
    """The key of a site's name, ``path`` or ``path#order``.

    >>> site_key("encoder.layer.1.attention.self"), site_key("layers.0@2#1")
    (('encoder.layer.1.attention.self', 0), ('layers.0@2', 1))
    """
    path, _, order = name.partition("#")
    return path, int(order or 0)


def site_name(site: SiteKey) -> str:
    """The name of a site's key, as ``str(AttentionSite)`` spells it.

    >>> site_name(("layers.0@2", 1)), site_name(("layers.0", 0))
    ('layers.0@2#1', 'layers.0')
    """
    path, order = site
    return path if order == 0 else f"{path}#{order}"


class MapSharing:
    """A context in which attentions of an eager model use the attention map of another one.

    A site is ``(path, order)``: ``path`` is the dotted path of the innermost module call that is running when the
    softmax or the fused attention is called, ``@n`` appended for call n + 1 of that module in one forward, and
    ``order`` its number among the softmaxes and fused attentions of that call. A forward begins, and the counts with
    it, whenever a module of the model is entered while none is running. A module registered under several paths goes
    by the one below the running module, and where there are several by the one called least so far, which is what
    ``[layer] * 4`` in a `ModuleList` means.

    A leader's map is the value of its softmax; of a fused attention it is computed openly, with zeros for a row that
    is masked as a whole. Gradients flow through the shared map, and each site applies its own dropout to a copy of it.

    Args:
        model: the original model. It is left as it was, whatever happens in the context.
        followers: for every site that follows, the site whose map it uses.

    Raises:
        UnsupportedError: a follower runs before its leader, their maps differ in shape, or (at the end of a context
            that raised nothing else) a site of ``followers`` was never met.

    >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    >>> with MapSharing(encoder, {("layers.1.self_attn", 0): ("layers.0.self_attn", 0)}) as sharing:
    ...     out = encoder(torch.randn(3, 5, 8))
    >>> sharing.met
    [('layers.0.self_attn', 0), ('layers.1.self_attn', 0)]
    >>> sharing.shapes
    {('layers.0.self_attn', 0): (3, 2, 5, 5)}
    """

    def __init__(self, model: torch.nn.Module, followers: Mapping[SiteKey, SiteKey]) -> None:
        for follower, leader in followers.items():
            if follower == leader:
                raise UnsupportedError(f"{site_name(follower)}: a site cannot follow itself; name another leader")
        self.followers = dict(followers)
        self.met: list[SiteKey] = []
        self.shapes: dict[SiteKey, tuple[int, ...]] = {}
        self._leaders = frozenset(followers.values())
        self._maps: dict[SiteKey, torch.Tensor] = {}
        self._ever_met: dict[SiteKey, None] = {}
        self._running = RunningModules(model, self._begin)
        self._intercept = Intercept(self._softmax, self._fused)
        self._fastpath = True

    def __enter__(self) -> MapSharing:
        self._fastpath = torch.backends.mha.get_fastpath_enabled()
        self._ever_met.clear()
        self._begin()
        self._running.watch()
        torch.backends.mha.set_fastpath_enabled(False)
        self._intercept.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._intercept.__exit__(kind, error, trace)
        torch.backends.mha.set_fastpath_enabled(self._fastpath)
        self._running.release()
        self._maps.clear()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise where a site that follows or leads was not met since the context was entered."""
        missing = [site for site in {**self.followers, **dict.fromkeys(self._leaders)} if site not in self._ever_met]
        if missing:
            raise UnsupportedError(
                f"maps cannot be shared as asked: {_listed(sorted(missing))} never ran; "
                f"the softmaxes and fused attentions that ran are: {_listed(self._ever_met)}"
            )

    def _begin(self) -> None:
        self.met.clear()
        self.shapes.clear()
        self._maps.clear()

    def _meet(self) -> SiteKey | None:
        site = self._running.next_site()
        if site is not None:
            self.met.append(site)
            self._ever_met[site] = None
        return site

    def _softmax(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        site = self._meet()
        if site is None or not self._shares(site):
            return function(*args, **kwargs)
        if site in self.followers:
            scores = args[0] if args else kwargs["input"]
            probs = self._shared(site, scores.shape)
        else:
            probs = function(*args, **kwargs)
        self._keep(site, probs)
        return probs

    def _fused(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        site = self._meet()
        if site is None or not self._shares(site):
            return function(*args, **kwargs)
        call = _FusedCall(*args, **kwargs)
        probs = self._shared(site, call.map_shape()) if site in self.followers else call.probs()
        self._keep(site, probs)
        return call.context(probs)

    def _shares(self, site: SiteKey) -> bool:
        return site in self.followers or site in self._leaders

    def _keep(self, site: SiteKey, probs: torch.Tensor) -> None:
        if site in self._leaders:
            self._maps[site] = probs.clone()  # a model may overwrite its own, as in-place dropout does
            self.shapes[site] = tuple(probs.shape)

    def _shared(self, site: SiteKey, expected: Iterable[int]) -> torch.Tensor:
        leader = self.followers[site]
        if leader not in self._maps:
            raise UnsupportedError(
                f"{site_name(site)} is to use the map of {site_name(leader)}, which did not run before it in this "
                f"forward; ran so far: {_listed(self.met)}"
            )
        probs = self._maps[leader]
        if probs.shape != torch.Size(expected):
            raise UnsupportedError(
                f"{site_name(site)} needs a map of shape {tuple(expected)}, and that of {site_name(leader)} is "
                f"{tuple(probs.shape)}; only sites whose maps have one shape can share"
            )
        return probs.clone()


def site_calls(model: torch.nn.Module, inputs: Any) -> list[SiteKey]:
    """The softmaxes and fused attentions that one forward runs, in order of execution.

    The model runs as it is, in its own mode, without gradients.

    Args:
        model: any module.
        inputs: a mapping of keyword arguments, a tuple of positional ones, or a single one.

    >>> site_calls(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Softmax(-1)), torch.ones(1, 2))
    [('1', 0)]
    """
    with MapSharing(model, {}) as sharing, torch.no_grad():
        if isinstance(inputs, Mapping):
            model(**inputs)
        else:
            model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    return list(sharing.met)


def _listed(sites: Iterable[SiteKey]) -> str:
    return ", ".join(site_name(site) or "(root)" for site in sites) or "none"


@dataclasses.dataclass(frozen=True)
class _FusedCall:
    """The arguments of one `scaled_dot_product_attention`, and the map that it keeps to itself."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def _per_query_head(self, operand: torch.Tensor) -> torch.Tensor:
        if not self.enable_gqa:
            return operand
        return operand.repeat_interleave(self.query.size(-3) // operand.size(-3), -3)

    def map_shape(self) -> tuple[int, ...]:
        batch = torch.broadcast_shapes(self.query.shape[:-2], self._per_query_head(self.key).shape[:-2])
        return (*batch, self.query.size(-2), self.key.size(-2))

    def probs(self) -> torch.Tensor:
        scale = self.query.size(-1) ** -0.5 if self.scale is None else self.scale
        scores = self.query @ self._per_query_head(self.key).transpose(-2, -1) * scale
        if self.is_causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, float("-inf"))
        if self.attn_mask is not None and self.attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~self.attn_mask, float("-inf"))
        elif self.attn_mask is not None:
            scores = scores + self.attn_mask
        empty = (scores == float("-inf")).all(-1, keepdim=True)
        return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)

    def context(self, probs: torch.Tensor) -> torch.Tensor:
        value = self._per_query_head(self.value)
        return F.dropout(probs.to(value.dtype), self.dropout_p) @ value
