"""Speech and audio models of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf

from .row import Built, Row, ids, padding, samples

LAYERS = 2
TINY = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
WAVE = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    **TINY,
}


def wave(
    name: str, kind: str, longer: int = 301, note: str = "", refused: Mapping[str, str] | None = None, **config: Any
) -> Row:
    """A sibling of wav2vec 2.0 by the stem of its class."""

    def build() -> Built:
        made = getattr(hf, f"{kind}Config")(**{**WAVE, **config})
        return samples(getattr(hf, f"{kind}Model")(made), longer=longer)

    return _row(name, build, note=note, refused=refused or {})


def _row(name: str, build: Any, sites: dict[str, int] | None = None, **more: Any) -> Row:
    return Row(name, "speech", sites or {"encoder self": LAYERS}, build, needs="transformers", **more)


def _frames(model: torch.nn.Module, width: int, name: str = "input_features", padded: bool = True) -> Built:
    def call(batch: int, length: int) -> dict[str, Any]:
        mask = {"attention_mask": padding(batch, length)} if padded else {}
        return {name: torch.randn(batch, length, width), **mask}

    return Built(model, call(2, 21), call(3, 29))


def _whisper_encoder() -> Built:
    layers = {"layers": LAYERS, "attention_heads": 4, "ffn_dim": 64}
    sizes = {f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in layers.items()}
    config = hf.WhisperConfig(vocab_size=99, d_model=32, max_source_positions=24, num_mel_bins=8, **sizes, **ENDS)
    model = hf.WhisperModel(config).get_encoder()
    return Built(model, *({"input_features": torch.randn(batch, 8, 48)} for batch in (2, 3)))


def _ast() -> Built:
    model = hf.ASTModel(
        hf.ASTConfig(**TINY, patch_size=4, max_length=24, num_mel_bins=8, frequency_stride=4, time_stride=4)
    )
    return Built(model, *({"input_values": torch.randn(batch, 24, 8)} for batch in (2, 3)))


def _w2v_bert() -> Built:
    config = hf.Wav2Vec2BertConfig(
        **TINY,
        feature_projection_input_dim=8,
        conv_depthwise_kernel_size=7,
        left_max_position_embeddings=6,
        right_max_position_embeddings=4,
        apply_spec_augment=False,
        layerdrop=0.0,
    )
    return _frames(hf.Wav2Vec2BertModel(config), 8)


def _parakeet() -> Built:
    config = hf.ParakeetEncoderConfig(
        **TINY, num_mel_bins=8, subsampling_conv_channels=8, conv_kernel_size=5, layerdrop=0.0
    )
    return _frames(hf.ParakeetEncoder(config), 8)


def _seamless() -> Built:
    config = hf.SeamlessM4TConfig(
        vocab_size=99,
        hidden_size=32,
        speech_encoder_layers=LAYERS,
        speech_encoder_attention_heads=4,
        speech_encoder_intermediate_size=64,
        feature_projection_input_dim=8,
        conv_depthwise_kernel_size=7,
        max_source_positions=64,
        adaptor_kernel_size=3,
        adaptor_stride=2,
        add_adapter=False,
        speech_encoder_layerdrop=0.0,
    )
    from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TConformerEncoder

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = SeamlessM4TConformerEncoder(config)

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.encoder(hidden_states)

    return Built(Encoder(), (torch.randn(2, 21, 32),), (torch.randn(3, 29, 32),))


def _fastspeech() -> Built:
    config = hf.FastSpeech2ConformerConfig(
        vocab_size=99,
        hidden_size=32,
        encoder_layers=LAYERS,
        encoder_num_attention_heads=4,
        encoder_linear_units=64,
        encoder_kernel_size=7,
    )
    from transformers.models.fastspeech2_conformer import modeling_fastspeech2_conformer as fastspeech

    module = {
        "num_attention_heads": 4,
        "layers": LAYERS,
        "kernel_size": 7,
        "attention_dropout_rate": 0.0,
        "dropout_rate": 0.0,
        "positional_dropout_rate": 0.0,
        "linear_units": 64,
        "normalize_before": True,
        "concat_after": False,
    }

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = fastspeech.FastSpeech2ConformerEncoder(config, module, use_encoder_input_layer=True)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.encoder(tokens)[0]

    return Built(Encoder(), (ids(2, 11),), (ids(3, 14),))


def _mimi() -> Built:
    from transformers.models.mimi.modeling_mimi import MimiTransformerModel

    config = hf.MimiConfig(**TINY, num_key_value_heads=4, head_dim=8, sliding_window=6, max_position_embeddings=64)

    class Transformer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = MimiTransformerModel(config)

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return self.transformer(states).last_hidden_state

    return Built(Transformer(), (torch.randn(2, 11, 32),), (torch.randn(3, 14, 32),))


def _musicgen() -> Built:
    from transformers.models.musicgen.modeling_musicgen import MusicgenModel

    config = hf.MusicgenDecoderConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        num_codebooks=2,
        max_position_embeddings=64,
        layerdrop=0.0,
    )

    def call(batch: int, length: int, source: int) -> dict[str, Any]:
        return {
            "input_ids": torch.randint(3, 98, (batch, 2, length)),
            "encoder_hidden_states": torch.randn(batch, source, 32),
        }

    return Built(MusicgenModel(config), call(2, 11, 7), call(3, 14, 9))


def _clap() -> Built:
    config = hf.ClapAudioConfig(
        window_size=4,
        num_mel_bins=16,
        spec_size=64,
        hidden_size=32,
        patch_size=4,
        patch_stride=[4, 4],
        depths=[2, 4],
        num_attention_heads=[2, 4],
        patch_embeds_hidden_size=16,
        num_hidden_layers=2,
    )
    return Built(hf.ClapAudioModel(config), *({"input_features": torch.randn(batch, 1, 64, 16)} for batch in (2, 3)))


# Called at 230 and 237 samples, which are 22 frames both.
POOLED: dict[str, Any] = {
    "longer": 237,
    "note": "the `max_pool1d` of its mask makes a number of the frames in any export; samples are free within them.",
}

ROWS = (
    wave("wav2vec 2.0", "Wav2Vec2"),
    wave("HuBERT", "Hubert"),
    wave("WavLM", "WavLM", num_buckets=16, max_bucket_distance=20),
    wave("Data2Vec audio", "Data2VecAudio"),
    wave("SEW", "SEW", squeeze_factor=2, **POOLED),
    wave(
        "SEW-D",
        "SEWD",
        squeeze_factor=2,
        position_buckets=8,
        max_position_embeddings=64,
        max_relative_positions=16,
        refused={"recompute": "dropout of its own kind"},
        **POOLED,
    ),
    wave(
        "wav2vec 2.0 Conformer, relative",
        "Wav2Vec2Conformer",
        position_embeddings_type="relative",
        conv_depthwise_kernel_size=7,
    ),
    wave(
        "wav2vec 2.0 Conformer, rotary",
        "Wav2Vec2Conformer",
        position_embeddings_type="rotary",
        conv_depthwise_kernel_size=7,
    ),
    _row("wav2vec2-BERT", _w2v_bert),
    _row("Whisper encoder", _whisper_encoder),
    _row("Audio Spectrogram Transformer", _ast),
    _row("Parakeet (FastConformer)", _parakeet),
    _row("SeamlessM4T Conformer", _seamless),
    _row("FastSpeech 2 Conformer", _fastspeech),
    _row("Mimi transformer", _mimi),
    _row("MusicGen decoder", _musicgen, {"decoder self": 2, "decoder cross": 2}),
    _row(
        "CLAP audio (Swin)",
        _clap,
        {"stage 1 self": 2, "stage 2 self": 4},
        plans={"layers.0": "1x*", "layers.1": "leaders=0,1,0,1"},
    ),
)
