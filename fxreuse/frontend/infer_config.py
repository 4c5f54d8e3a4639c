"""Example inputs of Hugging Face models, from the name of their main input and their configuration.

Models are known by what they have (`main_input_name`, `config`), not by their class: transformers is not imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from .samples import BATCH, LENGTH, OTHER_LENGTH, Sampler

_FRAMES = 50
_SECOND = 16_000
_IMAGE_SIZE = 224
_REGIONS = 3
_MODALITIES = ("input_ids", "pixel_values", "input_features", "bbox", "visual_feats", "visual_pos")

Arguments = dict[str, Any]


def huggingface_arguments(model: nn.Module, signature: inspect.Signature, sampler: Sampler) -> list[Arguments]:
    """Sets of arguments that a Hugging Face model may take, likely ones first; none for any other model.

    The main input comes with what goes with it: ids for a decoder, an image beside text, whatever else has no default.
    Where `forward` takes more (text beside an image), sets with more of it follow: a configuration does not tell which
    of them a model can do without.

    >>> huggingface_arguments(nn.Linear(2, 2), inspect.signature(nn.Linear(2, 2).forward), Sampler(nn.Linear(2, 2)))
    []
    """
    name, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if config is None or not isinstance(name, str) or name not in signature.parameters:
        return []
    names = list(dict.fromkeys([name, *required(signature)]))
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in signature.parameters:
        names.append("decoder_input_ids")
    other = [n for n in _MODALITIES if n in signature.parameters and n not in names]
    beside = ["pixel_values"] if "pixel_values" in other and name == "input_ids" and _is_dual_encoder(config) else []
    choices = [[*names, *beside], names, *([*names, n] for n in other), [*names, *other]]
    values = {n: _value(n, config, sampler) for n in (*names, *other)}
    found: list[Arguments] = []
    for choice in choices:
        arguments = {key: values[key] for key in signature.parameters if key in choice}
        if all(value is not None for value in arguments.values()) and list(arguments) not in map(list, found):
            found.append(arguments)
    return found


def required(signature: inspect.Signature) -> list[str]:
    """The arguments that have no default and a name.

    >>> required(inspect.signature(lambda x, *rest, scale, power=2, **options: x))
    ['x', 'scale']
    """
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind in kinds]


def _value(name: str, config: Any, sampler: Sampler) -> Tensor | None:
    """A value for an input of that name; None where the configuration does not tell."""
    maker = _VALUES.get(name)
    return None if maker is None else maker(config, sampler)


def _ids(config: Any, sampler: Sampler, length: int, *, decoder: bool = False) -> Tensor | None:
    text = config.get_text_config(decoder=decoder) if hasattr(config, "get_text_config") else config
    named = (getattr(config, name, None) for name in ("text_config", "encoder"))
    parts = [part for part in (text, config, *named) if part is not None]
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


def _parts(config: Any) -> Iterator[Any]:
    """The configuration, and then those of the parts that it names (a vision tower, an audio encoder)."""
    yield config
    names = (
        *(getattr(config, "sub_configs", None) or ()),
        "vision_config",
        "audio_config",
        "encoder_config",
        "encoder",
    )
    for name in dict.fromkeys(names):
        part = getattr(config, name, None)
        if part is not None:
            yield part


def _part_with(config: Any, *fields: str) -> Any:
    """The first part of a configuration that has all of these fields, set; None where none has."""
    return next((part for part in _parts(config) if all(getattr(part, field, None) for field in fields)), None)


def _pixels(config: Any, sampler: Sampler) -> Tensor:
    config = _part_with(config, "image_size") or config
    size = getattr(config, "image_size", None) or _IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    frames = [config.num_frames] if hasattr(config, "num_frames") else []
    return sampler.normal(BATCH, *frames, getattr(config, "num_channels", 3), height, width)


def _videos(config: Any, sampler: Sampler) -> Tensor | None:
    for frames, size in (("frames_per_clip", "crop_size"), ("num_frames", "image_size")):
        part = _part_with(config, frames, size)
        if part is not None:
            side = getattr(part, size)
            height, width = (side, side) if isinstance(side, int) else (side[0], side[-1])
            channels: Any = getattr(part, "in_chans", None) or getattr(part, "num_channels", 3)
            return sampler.normal(BATCH, getattr(part, frames), channels, height, width)
    return None


def _convolved(config: Any, sampler: Sampler) -> Tensor | None:
    """As many samples as the convolutions of a speech encoder turn into 50 frames."""
    part = _part_with(config, "conv_stride", "conv_kernel")
    if part is None:
        return None
    samples = _FRAMES
    for stride, kernel in zip(reversed(part.conv_stride), reversed(part.conv_kernel), strict=True):
        samples = (samples - 1) * stride + kernel
    return sampler.normal(BATCH, samples)


def _waveform(config: Any, sampler: Sampler) -> Tensor:
    """Samples for the convolutions; a spectrogram where mels are configured; or a second."""
    speech = _convolved(config, sampler)
    if speech is not None:
        return speech
    if hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):
        return sampler.normal(BATCH, config.max_length, config.num_mel_bins)
    channels = [config.audio_channels] if hasattr(config, "audio_channels") else []
    return sampler.normal(BATCH, *channels, _SECOND)


def _features(config: Any, sampler: Sampler) -> Tensor | None:
    """Log-mel features: mels first and of fixed length as in Whisper, an image of them as in CLAP, or frames first."""
    whole = _part_with(config, "num_mel_bins", "max_source_positions")
    if whole is not None:
        return sampler.normal(BATCH, whole.num_mel_bins, 2 * whole.max_source_positions)
    image = _part_with(config, "num_mel_bins", "spec_size")
    if image is not None:
        frames = image.spec_size * (image.spec_size // image.num_mel_bins)
        return sampler.normal(BATCH, 1, frames, image.num_mel_bins)
    for name in ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins"):
        part = _part_with(config, name)
        if part is not None:
            return sampler.normal(BATCH, 4 * _FRAMES, getattr(part, name))
    return None


def _history(config: Any, sampler: Sampler) -> Tensor | None:
    """The past of a time series, one channel or several."""
    length = getattr(config, "context_length", None)
    channels = getattr(config, "num_input_channels", None)
    return None if length is None else sampler.normal(BATCH, length, *([] if channels is None else [channels]))


def _boxes(config: Any, sampler: Sampler) -> Tensor:
    """A box for every token, left, top, right, bottom, in whole numbers that grow."""
    widest = getattr(config, "max_2d_position_embeddings", None) or 4
    return sampler.ids(widest, (), BATCH, LENGTH, 4).sort(-1).values


def _regions(config: Any, sampler: Sampler, width: Any) -> Tensor | None:
    return None if width is None else sampler.normal(BATCH, _REGIONS, width)


_VALUES: dict[str, Callable[[Any, Sampler], Tensor | None]] = {
    "input_ids": lambda config, sampler: _ids(config, sampler, LENGTH),
    "decoder_input_ids": lambda config, sampler: _ids(config, sampler, OTHER_LENGTH, decoder=True),
    "pixel_values": _pixels,
    "pixel_values_videos": _videos,
    "input_values": _waveform,
    "inputs": _convolved,
    "input_features": _features,
    "past_values": _history,
    "bbox": _boxes,
    "visual_feats": lambda config, sampler: _regions(config, sampler, getattr(config, "visual_feat_dim", None)),
    "visual_pos": lambda config, sampler: _regions(config, sampler, getattr(config, "visual_pos_dim", None)),
}
