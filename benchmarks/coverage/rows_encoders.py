"""Text encoders of transformers: each layer has one self-attention."""

from __future__ import annotations

from typing import Any

import transformers as hf

from .row import VOCABULARY, Built, Row, tokens

LAYERS = 2
TINY = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def encoder(
    name: str,
    kind: str,
    *,
    layers: int = LAYERS,
    plans: dict[str, str] | None = None,
    not_attention: int = 0,
    **config: Any,
) -> Row:
    """A text encoder by the stem of its class in transformers."""

    def build() -> Built:
        settings = {**TINY, **TEXT, "num_hidden_layers": layers, **config}
        return tokens(getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**settings)))

    sites = {"encoder self": layers}
    return Row(name, "text encoder", sites, build, plans=plans or {}, not_attention=not_attention, needs="transformers")


def _distilbert() -> Built:
    config = hf.DistilBertConfig(vocab_size=99, dim=32, n_layers=LAYERS, n_heads=4, hidden_dim=64)
    return tokens(hf.DistilBertModel(config))


def _albert() -> Built:
    config = hf.AlbertConfig(**TINY, **TEXT, embedding_size=16)
    return tokens(hf.AlbertModel(config))


def _deberta() -> Built:
    config = hf.DebertaV2Config(
        **TINY,
        **TEXT,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        max_relative_positions=16,
    )
    return tokens(hf.DebertaV2Model(config))


def _deberta_v1() -> Built:
    config = hf.DebertaConfig(
        **TINY, **TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=16
    )
    return tokens(hf.DebertaModel(config))


def _funnel() -> Built:
    config = hf.FunnelConfig(
        vocab_size=99, block_sizes=[2, 2], num_decoder_layers=2, d_model=32, n_head=4, d_head=8, d_inner=64
    )
    built = tokens(hf.FunnelModel(config))
    # Its positions take ``len`` of a tensor of pooled ones, which fixes the length.
    return Built(built.model, built.inputs, {name: value[:1].repeat(3, 1) for name, value in built.inputs.items()})


def _mobilebert() -> Built:
    config = hf.MobileBertConfig(**TINY, **TEXT, embedding_size=16, true_hidden_size=32, intra_bottleneck_size=32)
    return tokens(hf.MobileBertModel(config))


def _xlm() -> Built:
    config = hf.XLMConfig(vocab_size=99, emb_dim=32, n_layers=LAYERS, n_heads=4, max_position_embeddings=64)
    return tokens(hf.XLMModel(config))


def _xlnet() -> Built:
    config = hf.XLNetConfig(vocab_size=99, d_model=32, n_layer=LAYERS, n_head=4, d_inner=64)
    return tokens(hf.XLNetModel(config))


def _t5_encoder() -> Built:
    config = hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=LAYERS, num_heads=4)
    return tokens(hf.T5EncoderModel(config))


def _umt5_encoder() -> Built:
    config = hf.UMT5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=LAYERS, num_heads=4)
    return tokens(hf.UMT5EncoderModel(config))


def _fnet() -> Built:
    return tokens(hf.FNetModel(hf.FNetConfig(**{**TINY, **TEXT})), padded=False)


def _row(name: str, build: Any, sites: dict[str, int] | None = None, **more: Any) -> Row:
    return Row(
        name, "text encoder", {"encoder self": LAYERS} if sites is None else sites, build, needs="transformers", **more
    )


ROWS = (
    encoder("BERT", "Bert"),
    encoder("RoBERTa", "Roberta", **ENDS),
    encoder("ELECTRA", "Electra", embedding_size=16),
    encoder("Megatron-BERT", "MegatronBert"),
    encoder("MPNet", "MPNet", **ENDS),
    encoder("RemBERT", "RemBert", input_embedding_size=16),
    encoder("RoFormer", "RoFormer"),
    encoder("ESM-2", "Esm", position_embedding_type="rotary", pad_token_id=0, mask_token_id=4),
    encoder("MarkupLM", "MarkupLM"),
    encoder("I-BERT", "IBert"),
    encoder("NomicBERT", "NomicBert"),
    encoder("EuroBERT", "EuroBert", num_key_value_heads=2, **ENDS),
    # Each layer has a dynamic convolution, too, whose kernel is a softmax.
    encoder("ConvBERT", "ConvBert", embedding_size=32, not_attention=LAYERS),
    encoder("SqueezeBERT", "SqueezeBert", embedding_size=32, **{f"{part}_groups": 2 for part in ("q", "k", "v")}),
    encoder("Tapas", "Tapas"),
    # Layers 0, 3, … are global, the others local with a window.
    encoder(
        "ModernBERT",
        "ModernBert",
        layers=6,
        plans={"": "leaders=0,1,1,0,4,4"},
        local_attention=6,
        global_attn_every_n_layers=3,
        cls_token_id=1,
        sep_token_id=2,
        **ENDS,
    ),
    _row("DistilBERT", _distilbert),
    _row("ALBERT", _albert),
    _row("DeBERTa", _deberta_v1),
    _row("DeBERTa v2", _deberta),
    # The first attention of the second block has pooled queries; the decoder runs on full length.
    _row(
        "Funnel",
        _funnel,
        {"block 1 self": 2, "block 2 pooling": 1, "block 2 self": 1, "decoder self": 2},
        plans={"blocks.1": "1x*"},
        whole=True,
        note="its positions take `len` of a tensor of pooled ones, which fixes the length.",
    ),
    _row("MobileBERT", _mobilebert),
    _row("XLM", _xlm),
    _row("XLNet", _xlnet),
    _row("T5 encoder", _t5_encoder),
    _row("UMT5 encoder", _umt5_encoder),
    _row("FNet (no attention)", _fnet, {}),
)
