"""x-transformers: encoders and decoders with its options."""

from __future__ import annotations

from typing import Any

import torch

from .row import Built, Row, ids, padding

LAYERS = 2


def _tokens(kind: str, longer: int = 14, **options: Any) -> Any:
    def build() -> Built:
        import x_transformers

        layers = getattr(x_transformers, kind)(dim=32, depth=LAYERS, heads=4, attn_dim_head=8, **options)
        model = x_transformers.TransformerWrapper(num_tokens=99, max_seq_len=32, attn_layers=layers)
        if kind == "Decoder":
            return Built(model, {"x": ids(2, 11)}, {"x": ids(3, longer)})
        calls = ({"x": ids(2, 11), "mask": padding(2, 11) == 1} for _ in range(2))
        return Built(model, *calls)

    return build


def _cross() -> Built:
    import x_transformers

    layers = x_transformers.Decoder(dim=32, depth=LAYERS, heads=4, attn_dim_head=8, cross_attend=True)
    model = x_transformers.TransformerWrapper(num_tokens=99, max_seq_len=32, attn_layers=layers)
    calls = ({"x": ids(b, t), "context": torch.randn(b, s, 32)} for b, t, s in ((2, 7, 11), (3, 9, 14)))
    return Built(model, *calls)


def _vision() -> Built:
    import x_transformers

    layers = x_transformers.Encoder(dim=32, depth=LAYERS, heads=4, attn_dim_head=8)
    model = x_transformers.ViTransformerWrapper(image_size=32, patch_size=8, attn_layers=layers)
    return Built(model, {"img": torch.randn(2, 3, 32, 32)}, {"img": torch.randn(3, 3, 32, 32)})


# Both calls of these rows have the same sizes.
MASKED = "einx, with which x-transformers shapes masks, makes numbers of their sizes: the capture has fixed sizes."


def _row(name: str, build: Any, sites: dict[str, int] | None = None, **more: Any) -> Row:
    return Row(name, "x-transformers", sites or {"self": LAYERS}, build, needs="x_transformers", **more)


ROWS = (
    _row("x-transformers encoder, padding", _tokens("Encoder"), note=MASKED),
    _row("x-transformers decoder, flash", _tokens("Decoder", attn_flash=True)),
    _row("x-transformers decoder, rotary, q/k norm", _tokens("Decoder", rotary_pos_emb=True, attn_qk_norm=True)),
    _row("x-transformers encoder, T5 bias", _tokens("Encoder", rel_pos_bias=True), note=MASKED),
    _row(
        "x-transformers decoder, ALiBi",
        _tokens("Decoder", longer=11, alibi_pos_bias=True, alibi_num_heads=2),
        note="einx, with which it subtracts positions, makes numbers of their sizes: the length is fixed.",
    ),
    _row("x-transformers decoder, multi-query", _tokens("Decoder", attn_one_kv_head=True)),
    _row("x-transformers decoder, grouped", _tokens("Decoder", attn_kv_heads=2)),
    _row(
        "x-transformers encoder, talking heads",
        _tokens("Encoder", attn_pre_talking_heads=True, attn_post_talking_heads=True),
        note=MASKED,
        refused={"recompute": "map changed after the softmax"},
    ),
    _row("x-transformers encoder, value width", _tokens("Encoder", attn_value_dim_head=12), note=MASKED),
    _row("x-transformers encoder, memory keys", _tokens("Encoder", attn_num_mem_kv=4), note=MASKED),
    _row("x-transformers decoder, cross", _cross, {"decoder self": LAYERS, "decoder cross": LAYERS}),
    _row("x-transformers vision", _vision),
)
