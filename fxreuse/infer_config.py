"""Example inputs of Hugging Face models, from the name of their main input and their configuration.

Models are known by what they have (`main_input_name`, `config`), not by their class: transformers is not imported.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from .samples import BATCH, LENGTH, OTHER_LENGTH, Sampler

_FRAMES = 50
_SECOND = 16_000
_IMAGE_SIZE = 224


def huggingface_arguments(model: nn.Module, signature: inspect.Signature, sampler: Sampler) -> dict[str, Any] | None:
    """The main input, and what goes with it: ids for a decoder, an image beside text. None for any other model.

    >>> huggingface_arguments(nn.Linear(2, 2), inspect.signature(nn.Linear(2, 2).forward), Sampler(nn.Linear(2, 2)))
    """
    name, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if config is None or not isinstance(name, str) or name not in signature.parameters:
        return None
    main = _value(name, config, sampler)
    if main is None:
        return None
    arguments: dict[str, Any] = {name: main}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in signature.parameters:
        arguments["decoder_input_ids"] = _ids(config, sampler, OTHER_LENGTH, decoder=True)
    if name == "input_ids" and "pixel_values" in signature.parameters and _is_dual_encoder(config):
        arguments["pixel_values"] = _pixels(config.vision_config, sampler)
    return {key: arguments[key] for key in signature.parameters if key in arguments}


def _value(name: str, config: Any, sampler: Sampler) -> Tensor | None:
    """A value for an input of that name; None where the configuration does not tell."""
    if name == "input_ids":
        return _ids(config, sampler, LENGTH)
    if name == "pixel_values":
        return _pixels(config, sampler)
    if name == "input_values":
        return _waveform(config, sampler)
    if name == "input_features":
        return _features(config, sampler)
    return None


def _ids(config: Any, sampler: Sampler, length: int, *, decoder: bool = False) -> Tensor | None:
    text = config.get_text_config(decoder=decoder) if hasattr(config, "get_text_config") else config
    parts = [part for part in (text, config, getattr(config, "text_config", None)) if part is not None]
    sizes = [part.vocab_size for part in parts if getattr(part, "vocab_size", None)]
    if decoder and getattr(config, "decoder_vocab_size", None):
        sizes.insert(0, config.decoder_vocab_size)
    if not sizes:
        return None
    return sampler.ids(sizes[0], set().union(*map(_special_ids, parts)), BATCH, length)


def _special_ids(config: Any) -> set[int]:
    """Padding, and every other token that is not plain text."""
    named = [value for key, value in vars(config).items() if key.endswith(("_token_id", "_token_index"))]
    flat = [item for value in named for item in (value if isinstance(value, (list, tuple)) else [value])]
    return {item for item in flat if isinstance(item, int)}


def _is_dual_encoder(config: Any) -> bool:
    """Whether text and image go in side by side, and no place in the text stands for the image."""
    marks = ("image_token_id", "image_token_index")
    return hasattr(config, "vision_config") and not any(hasattr(config, mark) for mark in marks)


def _pixels(config: Any, sampler: Sampler) -> Tensor:
    for part in (config, getattr(config, "vision_config", None), getattr(config, "encoder", None)):
        if getattr(part, "image_size", None):
            config = part
            break
    size = getattr(config, "image_size", None) or _IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    frames = [config.num_frames] if hasattr(config, "num_frames") else []
    return sampler.normal(BATCH, *frames, getattr(config, "num_channels", 3), height, width)


def _waveform(config: Any, sampler: Sampler) -> Tensor:
    """As many samples as the convolutions turn into 50 frames; a spectrogram where mels are configured; or a second."""
    if hasattr(config, "conv_stride") and hasattr(config, "conv_kernel"):
        samples = _FRAMES
        for stride, kernel in zip(reversed(config.conv_stride), reversed(config.conv_kernel), strict=True):
            samples = (samples - 1) * stride + kernel
        return sampler.normal(BATCH, samples)
    if hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):
        return sampler.normal(BATCH, config.max_length, config.num_mel_bins)
    channels = [config.audio_channels] if hasattr(config, "audio_channels") else []
    return sampler.normal(BATCH, *channels, _SECOND)


def _features(config: Any, sampler: Sampler) -> Tensor | None:
    """Log-mel features: mels first and of fixed length as in Whisper, or frames first."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        return sampler.normal(BATCH, config.num_mel_bins, 2 * config.max_source_positions)
    for name in ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins"):
        if hasattr(config, name):
            return sampler.normal(BATCH, 4 * _FRAMES, getattr(config, name))
    return None
