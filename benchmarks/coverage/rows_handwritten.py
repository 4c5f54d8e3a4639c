"""Models by hand, of `models.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import models
from .models import Separate, Stack
from .row import Built, Row, states

LAYERS = 3


def layers(
    name: str, layer: Callable[..., nn.Module], after: Callable[[], nn.Module] | None = None, **more: Any
) -> Row:
    """A stack of one kind of layer, called with hidden states; each has one attention."""
    return _row(name, lambda: states(Stack(layer, LAYERS, after() if after else None)), **more)


def _row(name: str, build: Any, sites: dict[str, int] | None = None, **more: Any) -> Row:
    return Row(name, "by hand", {"self": LAYERS} if sites is None else sites, build, **more)


def _pictures(model: nn.Module, sides: tuple[tuple[int, int], ...]) -> Built:
    shapes = [(batch, *side, models.WIDTH) for batch, side in zip((2, 3), sides, strict=True)]
    return Built(model, *((torch.randn(shape),) for shape in shapes))


def _conformer() -> Built:
    def call(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(len(lengths), max(lengths), models.WIDTH), torch.tensor(lengths)

    return Built(models.ConformerEncoder(), call([9, 6]), call([12, 5, 8]))


def _decoder() -> Built:
    calls = ((torch.randn(b, t, 16), torch.randn(b, s, 16)) for b, t, s in ((2, 5, 8), (3, 7, 10)))
    return Built(Stack(models.Decoder), *calls)


class _BySoftmax(Stack):
    """`WrittenOut` with the softmax called by name."""

    def __init__(self) -> None:
        super().__init__(Separate)


def _written_out() -> Built:
    built = states(Stack(models.WrittenOut))
    return Built(built.model, built.inputs, built.other, reference=_BySoftmax())


def _flex() -> Built:
    model = Stack(models.Flex)
    return states(model.requires_grad_(False))  # on a CPU it has no gradients


ROWS = (
    layers("timm ViT, fused", lambda: models.TimmViT(True)),
    layers("timm ViT, unfused", lambda: models.TimmViT(False)),
    _row("torchaudio Conformer, lengths", _conformer),
    layers("QKV interleaved by head", models.Interleaved),
    layers("QKV in thirds, bmm over batch × heads", models.Thirds),
    layers("einsum with head weights", models.Einsum),
    layers("einsum QKV, heads last in the map", models.EinsumFused),
    layers("Multi-query", models.MultiQuery),
    layers("Grouped queries by broadcasting", models.Grouped),
    layers("Value width ≠ key width", models.ValueWidth),
    layers("Rotary, halves", lambda: models.Rotary(False)),
    layers("Rotary, neighbours", lambda: models.Rotary(True)),
    layers("ALiBi, causal", models.Alibi),
    layers("Sliding window", models.SlidingWindow),
    layers("Streaming chunks", models.Chunked),
    layers("Relative shift (Transformer-XL)", models.RelativeShift),
    layers("Talking heads", models.TalkingHeads, refused={"recompute": "heads mixed before the softmax"}),
    layers("Attention sinks", models.Sinks),
    layers("Zero key and value", models.OffByOne),
    layers("Weak attention suppression", models.Suppressed, refused={"recompute": "map changed after the softmax"}),
    layers("Head weights, float32 softmax", models.HeadMask),
    layers("Soft-capped scores", models.SoftCap, refused={"recompute": "scores not affine"}),
    layers("Cosine attention, learned temperature", models.Cosine),
    _row("Softmax as exp / sum", _written_out),
    _row("FlexAttention", _flex, refused={"whole": "FlexAttention"}),
    layers("Keys first", models.KeyFirst),
    layers("Several consumers of a map (Zipformer)", models.TwoConsumers),
    _row("Axial", lambda: _pictures(models.Pictures(models.Axial), ((4, 6), (4, 6))), {"rows": 3, "columns": 3}),
    # Even and odd layers of a stage differ in their mask.
    _row(
        "Swin stages",
        lambda: _pictures(models.Swin(), ((8, 8), (8, 8))),
        {"stage 1": 4, "stage 2": 4},
        plans={"": "leaders=0,1,0,1"},
    ),
    _row("One layer, four calls (ALBERT)", lambda: states(models.Reused(Separate())), {"self": 4}),
    _row(
        "Layers of three names",
        lambda: states(models.Unrolled()),
        {"first": 1, "second": 1, "third": 1},
        whole=True,
        refused=dict.fromkeys(("materialize", "recompute"), "no two layers repeat"),
    ),
    _row("Decoder with memory", _decoder, {"self": LAYERS, "cross": LAYERS}),
    layers("With attentive pooling and a classifier", Separate, models.AttentivePooling, not_attention=2),
    layers("With a pooling query", Separate, models.ProbePooling, not_attention=1),
    layers("With a router", Separate, models.Router, not_attention=1),
    layers("With a dynamic convolution", Separate, models.GatedConvolution, not_attention=1),
    _row("Router alone", lambda: states(Stack(models.Router)), {}, not_attention=LAYERS),
    _row("Pooling alone", lambda: states(models.AttentivePooling()), {}, not_attention=2),
)
