"""Audio for speech models, from a file or synthetic: float waveforms in [-1, 1], one channel, no library but torch."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FxReuseError

SPEECH_RATE = 16_000
"""The sampling rate of speech models, in samples a second."""

# A vowel: the first three formants, in Hz.
_VOWELS = (
    (730, 1090, 2440),
    (270, 2290, 3010),
    (300, 870, 2240),
    (530, 1840, 2480),
    (570, 840, 2410),
    (440, 1020, 2240),
)
_BANDWIDTHS = (80.0, 110.0, 160.0)


class AudioError(FxReuseError, ValueError):
    """A file that is not audio as this package reads it."""


def read_wav(path: str | Path) -> tuple[Tensor, int]:
    """The waveform of a PCM wav file, its channels averaged, and its sampling rate.

    Args:
        path: a wav file of 8, 16, 24 or 32 bit integers.

    Returns:
        The samples, a float32 tensor of shape (samples,) with values in [-1, 1], and the rate in Hz.

    Raises:
        AudioError: no such file, not a wav file, another encoding than PCM integers, or no samples in it.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except OSError as error:
        raise AudioError(f"audio {str(path)!r}: cannot be read ({error.strerror})") from error
    except (wave.Error, EOFError) as error:
        raise AudioError(
            f"audio {str(path)!r}: expected a PCM wav file, found something else ({error or 'too short'}); "
            "convert it, for instance with: ffmpeg -i FILE -ac 1 -ar 16000 -c:a pcm_s16le out.wav"
        ) from error
    if width not in (1, 2, 3, 4):
        raise AudioError(f"audio {str(path)!r}: expected 8, 16, 24 or 32 bit samples, found {8 * width} bit")
    frame = channels * width
    data = data[: len(data) // frame * frame]
    if not data:
        raise AudioError(f"audio {str(path)!r}: there are no samples in it")
    return _decode(data, width).reshape(-1, channels).mean(dim=1), rate


def _decode(data: bytes, width: int) -> Tensor:
    """Little-endian PCM integers of a width in bytes as floats in [-1, 1]; 8 bit is unsigned, as wav has it."""
    octets = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if width == 1:
        return (octets.float() - 128) / 128
    places = octets.reshape(-1, width).to(torch.int64)
    value = (places << torch.arange(0, 8 * width, 8)).sum(dim=1)
    half = 1 << (8 * width - 1)
    return (torch.where(value >= half, value - 2 * half, value).double() / half).float()


def resample(waveform: Tensor, rate: int, new_rate: int = SPEECH_RATE, zero_crossings: int = 24) -> Tensor:
    """A waveform at another sampling rate, by windowed-sinc interpolation.

    The band above the lower of the two Nyquist frequencies is cut off, so that nothing aliases.

    Args:
        waveform: samples, of shape (samples,).
        rate: its sampling rate, in Hz.
        new_rate: the rate asked for, in Hz.
        zero_crossings: half width of the filter, in zero crossings of the sinc: more of them cut more sharply.

    Returns:
        A tensor of shape (ceil(samples · new_rate / rate),) and the same dtype.

    >>> resample(torch.zeros(44_100), 44_100, 16_000).shape
    torch.Size([16000])
    """
    if rate == new_rate:
        return waveform
    divisor = math.gcd(rate, new_rate)
    step, phases = rate // divisor, new_rate // divisor
    cutoff = 0.95 * min(1.0, new_rate / rate)  # of the input's Nyquist frequency; the rest is the transition band
    reach = math.ceil(zero_crossings / cutoff)
    taps = torch.arange(-reach, reach + step, dtype=torch.float64)
    # Output sample k·phases + p lies at input position k·step + p·step/phases: one filter for each phase p.
    distance = taps[None, :] - torch.arange(phases, dtype=torch.float64)[:, None] * step / phases
    window = torch.cos(math.pi / 2 * (distance / reach).clamp(-1, 1)) ** 2
    filters = cutoff * torch.sinc(cutoff * distance) * window
    filters = filters / filters.sum(dim=1, keepdim=True)
    length = math.ceil(waveform.numel() * phases / step)
    padded = torch.nn.functional.pad(waveform, (reach, reach + step))
    columns = torch.nn.functional.conv1d(padded[None, None], filters.to(waveform.dtype)[:, None], stride=step)
    return columns[0].T.reshape(-1)[:length]


def normalise(waveform: Tensor) -> Tensor:
    """A waveform with zero mean and unit variance, as the feature extractors of HuBERT and wav2vec 2.0 give it."""
    return (waveform - waveform.mean()) / torch.sqrt(waveform.var(correction=0) + 1e-7)


def speech_like(seconds: float, rate: int = SPEECH_RATE, seed: int = 0) -> Tensor:
    """A synthetic signal with the structure of speech: syllables of moving pitch and formants, fricatives, pauses.

    Args:
        seconds: its length.
        rate: its sampling rate, in Hz.
        seed: of the random choices; the same seed gives the same signal.

    Returns:
        A float32 tensor of shape (round(seconds · rate),) with zero mean and unit variance.

    >>> speech_like(0.5).shape
    torch.Size([8000])
    """
    length = round(seconds * rate)
    if length < 1:
        raise AudioError(f"synthetic speech: expected a positive length, found {seconds} s")
    random = torch.Generator().manual_seed(seed)
    pieces: list[Tensor] = []
    vowel = _VOWELS[0]
    while sum(piece.numel() for piece in pieces) < length:
        kind, following = _uniform(random, 0, 1), _VOWELS[int(_uniform(random, 0, len(_VOWELS)))]
        if kind < 0.15:
            pieces.append(torch.zeros(int(rate * _uniform(random, 0.08, 0.3))))
        elif kind < 0.35:
            pieces.append(_fricative(int(rate * _uniform(random, 0.06, 0.14)), rate, random))
        else:
            pieces.append(_syllable(int(rate * _uniform(random, 0.12, 0.3)), rate, vowel, following, random))
            vowel = following
    signal = torch.cat(pieces)[:length]
    breath = 1e-3 * torch.randn(length, generator=random)
    return normalise(signal + breath)


def _syllable(length: int, rate: int, start: tuple[int, ...], end: tuple[int, ...], random: torch.Generator) -> Tensor:
    """A voiced syllable: the harmonics of a gliding pitch under formant resonances that move between two vowels.

    The pulse train is summed from its harmonics, each as loud as the glottal spectrum (12 dB an octave, 6 of them made
    up for by radiation at the lips) and the resonances let it be at that moment: the same as filtering, but parallel.
    """
    along = torch.linspace(0, 1, length)
    pitch = torch.lerp(torch.tensor(_uniform(random, 95, 150)), torch.tensor(_uniform(random, 80, 130)), along)
    pitch = pitch * (1 + 0.01 * torch.sin(2 * math.pi * 5 * along * length / rate))
    phase = 2 * math.pi * torch.cumsum(pitch.double(), dim=0) / rate
    harmonics = torch.arange(1, int(min(5_000, rate / 2) / 80))[:, None]
    frequency = harmonics * pitch
    glide = (1 - torch.cos(math.pi * along)) / 2
    loudness = (frequency < 0.48 * rate) / harmonics
    for low, high, bandwidth in zip(start, end, _BANDWIDTHS, strict=True):
        centre = low + (high - low) * glide
        loudness = loudness * centre**2 / torch.hypot(centre**2 - frequency**2, bandwidth * frequency)
    voiced = (loudness * torch.sin(harmonics * phase).float()).sum(dim=0)
    return _uniform(random, 0.6, 1.0) * _envelope(length) * voiced / voiced.abs().max()


def _fricative(length: int, rate: int, random: torch.Generator) -> Tensor:
    """A stretch of noise in one band of the high frequencies, as in s, sh and f."""
    centre = _uniform(random, 2_500, min(6_500.0, 0.45 * rate))
    spectrum = torch.fft.rfft(torch.randn(length, generator=random))
    frequency = torch.fft.rfftfreq(length, 1 / rate)
    band = torch.exp(-(((frequency - centre) / 900) ** 2))
    noise = torch.fft.irfft(spectrum * band, n=length)
    return _uniform(random, 0.08, 0.25) * _envelope(length) * noise / noise.abs().max()


def _envelope(length: int) -> Tensor:
    """A rise and a fall, faster up than down."""
    along = torch.linspace(0, 1, length)
    return torch.clamp(along / 0.2, max=1.0) * torch.clamp((1 - along) / 0.35, max=1.0)


def _uniform(random: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=random))
