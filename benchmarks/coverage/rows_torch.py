"""torch.nn's own Transformers, and `MultiheadAttention` in its argument forms."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .row import Built, Row, padding, states

LAYERS = 2


class Stack(nn.Module):
    """`MultiheadAttention` layers that are called in one form; ``memory`` is what cross-attention looks at."""

    def __init__(self, form: str, layers: int = LAYERS, **settings: Any) -> None:
        super().__init__()
        self.form = form
        self.layers = nn.ModuleList(nn.MultiheadAttention(16, 4, **settings) for _ in range(layers))

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None, padded: torch.Tensor | None = None) -> Any:
        weights = []
        for layer in self.layers:
            out, probs = layer(*self._operands(x, memory), **self._options(x, padded))
            x = x + out
            weights.append(probs)
        return (x, weights) if self.form == "weights" else x

    def _operands(
        self, x: torch.Tensor, memory: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if memory is None:
            return x, x, x
        return x, memory[..., : self.layers[0].kdim], memory[..., : self.layers[0].vdim]

    def _options(self, x: torch.Tensor, padded: torch.Tensor | None) -> dict[str, Any]:
        options: dict[str, Any] = {"need_weights": self.form in ("weights", "per head")}
        length = x.shape[1]
        if self.form == "per head":
            options["average_attn_weights"] = False
        if self.form in ("causal", "causal and padding"):
            options["attn_mask"] = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            options["is_causal"] = self.form == "causal"
        if self.form == "float mask":
            distance = torch.arange(length, device=x.device)
            options["attn_mask"] = -(distance[:, None] - distance[None, :]).abs().to(x.dtype)
        if padded is not None:
            options["key_padding_mask"] = padded
        return options


def _padded(batch: int, length: int) -> torch.Tensor:
    return padding(batch, length) == 0


def _stack(form: str, padded: bool = False, memory: int = 0, **settings: Any) -> Any:
    def build() -> Built:
        def call(batch: int, length: int, source: int) -> dict[str, Any]:
            given: dict[str, Any] = {"x": torch.randn(batch, length, 16)}
            if memory:
                given["memory"] = torch.randn(batch, source, memory)
            if padded:
                given["padded"] = _padded(batch, source if memory else length)
            return given

        return Built(Stack(form, **{"batch_first": True, **settings}), call(2, 5, 8), call(3, 7, 10))

    return build


def _encoder(norm_first: bool, padded: bool = False, batch_first: bool = True) -> Any:
    def build() -> Built:
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first, norm_first=norm_first)
        model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        if not padded:
            return states(model)
        calls = (({"src": torch.randn(b, t, 16), "src_key_padding_mask": _padded(b, t)}) for b, t in ((2, 5), (3, 7)))
        return Built(model, *calls)

    return build


def _decoder() -> Built:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, batch_first=True), LAYERS)

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = model

        def forward(self, target: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], target.device, target.dtype)
            return self.decoder(target, memory, tgt_mask=mask, tgt_is_causal=True)

    return Built(Causal(), *((torch.randn(b, t, 16), torch.randn(b, s, 16)) for b, t, s in ((2, 5, 8), (3, 7, 10))))


def _transformer() -> Built:
    model = nn.Transformer(16, 4, 2, 2, 32, batch_first=True)
    calls = ({"src": torch.randn(b, s, 16), "tgt": torch.randn(b, t, 16)} for b, t, s in ((2, 5, 8), (3, 7, 10)))
    return Built(model, *calls)


def _row(name: str, build: Any, sites: dict[str, int] | None = None) -> Row:
    return Row(name, "torch.nn", sites or {"self": LAYERS}, build)


CROSS = {"cross": LAYERS}

ROWS = (
    _row("TransformerEncoder, post-norm", _encoder(False)),
    _row("TransformerEncoder, pre-norm, sequence first", _encoder(True, batch_first=False)),
    _row("TransformerEncoder, padding", _encoder(False, padded=True)),
    _row("TransformerDecoder, causal", _decoder, {"decoder self": LAYERS, "decoder cross": LAYERS}),
    _row("Transformer", _transformer, {"encoder self": 2, "decoder self": 2, "decoder cross": 2}),
    _row("MultiheadAttention", _stack("plain")),
    _row("MultiheadAttention, weights returned", _stack("weights")),
    _row("MultiheadAttention, weights per head", _stack("per head")),
    _row("MultiheadAttention, causal", _stack("causal")),
    _row("MultiheadAttention, causal and padding", _stack("causal and padding", padded=True)),
    _row("MultiheadAttention, float mask", _stack("float mask")),
    _row("MultiheadAttention, bias_kv and zero_attn", _stack("plain", add_bias_kv=True, add_zero_attn=True)),
    _row("MultiheadAttention, sequence first, no bias", _stack("plain", batch_first=False, bias=False)),
    _row("MultiheadAttention, cross, kdim ≠ vdim", _stack("plain", True, 12, kdim=8, vdim=12), CROSS),
)
