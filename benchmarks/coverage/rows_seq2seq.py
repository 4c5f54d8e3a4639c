"""Encoder–decoders of transformers: self-attention on both sides, cross-attention in each layer of the decoder."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from .row import VOCABULARY, Built, Row, ids, padding, pairs

LAYERS = 2
SITES = {"encoder self": LAYERS, "decoder self": LAYERS, "decoder cross": LAYERS}
_SIZES = {"layers": LAYERS, "attention_heads": 4, "ffn_dim": 64}
BOTH = {f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in _SIZES.items()}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}


def bart_like(name: str, kind: str, **config: Any) -> Row:
    """A sibling of BART by the stem of its class."""

    def build() -> Built:
        settings = {"d_model": 32, **BOTH, **TEXT, **ENDS, **config}
        return pairs(getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**settings)))

    return Row(name, "encoder–decoder", SITES, build, needs="transformers")


def t5_like(name: str, kind: str, not_attention: int = 0, refused: dict[str, str] | None = None, **config: Any) -> Row:
    """A sibling of T5 by the stem of its class."""

    def build() -> Built:
        sizes = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": 4}
        return pairs(getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**sizes, **ENDS, **config)))

    more: dict[str, Any] = {"not_attention": not_attention, "refused": refused or {}, "needs": "transformers"}
    return Row(name, "encoder–decoder", SITES, build, **more)


def _frames(model: torch.nn.Module, name: str, *shapes: tuple[int, ...]) -> Built:
    calls = [{name: torch.randn(shape), "decoder_input_ids": ids(shape[0], 6 + shape[0])} for shape in shapes]
    return Built(model, *calls)


def _whisper() -> Built:
    lengths = {"max_source_positions": 24, "max_target_positions": 32, "num_mel_bins": 8}
    model = hf.WhisperModel(hf.WhisperConfig(vocab_size=99, d_model=32, **BOTH, **lengths, **ENDS))
    return _frames(model, "input_features", (2, 8, 48), (3, 8, 48))


def _moonshine() -> Built:
    parts = ("encoder", "decoder")
    sizes = {
        f"{part}_{what}": size
        for part in parts
        for what, size in (("num_hidden_layers", 2), ("num_attention_heads", 4))
    }
    model = hf.MoonshineModel(hf.MoonshineConfig(vocab_size=99, hidden_size=32, intermediate_size=64, **sizes, **ENDS))
    return _frames(model, "input_values", (2, 2000), (3, 2600))


def _speech_to_text() -> Built:
    config = hf.Speech2TextConfig(
        vocab_size=99,
        d_model=32,
        **BOTH,
        **ENDS,
        input_feat_per_channel=8,
        conv_channels=16,
        max_source_positions=64,
        max_target_positions=32,
    )
    return _frames(hf.Speech2TextModel(config), "input_features", (2, 37, 8), (3, 45, 8))


def _bert2bert() -> Built:
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, **TEXT}
    encoder, decoder = hf.BertConfig(**tiny), hf.BertConfig(**tiny, is_decoder=True, add_cross_attention=True)
    return pairs(hf.EncoderDecoderModel(hf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)))


def _prophetnet() -> Built:
    config = hf.ProphetNetConfig(
        vocab_size=99,
        hidden_size=32,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        ngram=1,
        **ENDS,
    )
    built = pairs(hf.ProphetNetModel(config))
    calls = [{**call, "attention_mask": call["attention_mask"].float()} for call in (built.inputs, built.other)]
    return Built(built.model, *calls)


def _time_series() -> Built:
    config = hf.TimeSeriesTransformerConfig(
        prediction_length=5, context_length=9, d_model=32, lags_sequence=[1, 2], num_time_features=2, **BOTH
    )

    def call(batch: int) -> dict[str, Any]:
        past, future = 9 + 2, 5
        return {
            "past_values": torch.randn(batch, past),
            "past_time_features": torch.randn(batch, past, 2),
            "past_observed_mask": torch.ones(batch, past),
            "future_values": torch.randn(batch, future),
            "future_time_features": torch.randn(batch, future, 2),
        }

    return Built(hf.TimeSeriesTransformerModel(config), call(2), call(3))


def _speecht5() -> Built:
    tower = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = hf.SpeechT5Config(
        vocab_size=99,
        hidden_size=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_text_positions=64,
        speech_decoder_prenet_units=16,
        speaker_embedding_dim=8,
        speech_decoder_prenet_dropout=0.0,  # it is on in evaluation mode, too
        encoder_max_relative_position=8,
        **tower,
    )

    def call(batch: int, length: int, frames: int) -> dict[str, Any]:
        return {
            "input_ids": ids(batch, length),
            "attention_mask": padding(batch, length),
            "decoder_input_values": torch.randn(batch, frames, 8),
            "speaker_embeddings": torch.randn(batch, 8),
        }

    return Built(hf.SpeechT5ForTextToSpeech(config), call(2, 11, 7), call(3, 14, 9))


def _row(name: str, build: Any, sites: dict[str, int] = SITES, **more: Any) -> Row:
    return Row(name, "encoder–decoder", sites, build, needs="transformers", **more)


ROWS = (
    bart_like("BART", "Bart"),
    bart_like("Pegasus", "Pegasus"),
    bart_like("M2M-100", "M2M100"),
    t5_like("T5", "T5"),
    t5_like("UMT5", "UMT5"),
    # The second layer on either side has a router.
    t5_like(
        "Switch Transformer",
        "SwitchTransformers",
        not_attention=2,
        refused={"whole": "Python that depends on values"},
        num_decoder_layers=LAYERS,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    _row("BERT2BERT", _bert2bert),
    _row("Whisper", _whisper),
    _row("Moonshine", _moonshine),
    _row("Speech2Text", _speech_to_text),
    _row("SpeechT5", _speecht5),
    _row("Time Series Transformer", _time_series),
    # Each decoder layer attends with two streams, the main one and one predicting stream.
    _row(
        "ProphetNet",
        _prophetnet,
        {"encoder self": 2, "decoder main stream": 2, "decoder predicting stream": 2, "decoder cross": 2},
        note="its padding mask is given in floating point: of integers the model itself makes NaN in float64, "
        "as 0 times minus infinity.",
    ),
)
