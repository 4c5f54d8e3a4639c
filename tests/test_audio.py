"""Audio: wav files of every width round-trip, resampling neither bends nor aliases, synthetic speech is as promised."""

import math
import struct
import wave

import pytest
import torch

from fxreuse import FxReuseError
from fxreuse.command.audio import AudioError, normalise, read_wav, resample, speech_like


def write_wav(path, waveform, rate, width, channels=1):
    """Write values in [-1, 1), of shape (frames, channels), as PCM of a width in bytes."""
    scaled = (waveform.double() * (1 << (8 * width - 1))).round().long().reshape(-1).tolist()
    if width == 1:
        data = bytes(value + 128 for value in scaled)
    else:
        data = b"".join(value.to_bytes(width, "little", signed=True) for value in scaled)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)


def sine(frequency, rate, seconds=0.5):
    return torch.sin(2 * math.pi * frequency * torch.arange(int(seconds * rate), dtype=torch.float64) / rate).float()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_width_is_read_to_its_precision(tmp_path, width):
    extremes = torch.tensor([-1.0, 0.0, 1 - 2.0 ** (1 - 8 * width)], dtype=torch.float64)
    values = torch.cat([extremes, 0.9 * sine(300, 8_000)])
    write_wav(tmp_path / "a.wav", values, 8_000, width)
    read, rate = read_wav(tmp_path / "a.wav")
    assert rate == 8_000
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, values.float(), atol=2.0 ** (-8 * width) * 1.01 + 1e-7, rtol=0)
    assert read[0] == -1


def test_channels_are_averaged(tmp_path):
    left, right = 0.5 * sine(200, 16_000), 0.25 * sine(700, 16_000)
    write_wav(tmp_path / "a.wav", torch.stack([left, right], dim=1), 16_000, 2, channels=2)
    torch.testing.assert_close(read_wav(tmp_path / "a.wav")[0], (left + right) / 2, atol=1e-4, rtol=0)


def test_data_that_is_cut_within_a_frame_is_read_up_to_it(tmp_path):
    write_wav(tmp_path / "a.wav", 0.5 * sine(200, 16_000), 16_000, 2)
    whole = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "b.wav").write_bytes(whole[:-101])
    assert read_wav(tmp_path / "b.wav")[0].numel() == 8_000 - 51


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ID3\x03this is an mp3, not a wav file at all", "expected a PCM wav file, found something else .*ffmpeg"),
        (b"", "expected a PCM wav file"),
        (
            b"RIFF" + struct.pack("<I", 44) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 3, 1, 16000, 64000, 4, 32)
            + b"data" + struct.pack("<If", 4, 0.5),
            "expected a PCM wav file, found something else .*unknown format: 3",
        ),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(AudioError, match=message) as caught:
        read_wav(tmp_path / "a.wav")
    assert isinstance(caught.value, FxReuseError)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(AudioError, match=r"none\.wav': cannot be read \(No such file"):
        read_wav(tmp_path / "none.wav")
    write_wav(tmp_path / "a.wav", torch.zeros(0), 16_000, 2)
    with pytest.raises(AudioError, match="no samples"):
        read_wav(tmp_path / "a.wav")


@pytest.mark.parametrize(("rate", "new_rate"), [(8_000, 16_000), (22_050, 16_000), (44_100, 16_000), (48_000, 16_000)])
def test_resampling_keeps_what_is_in_the_band(rate, new_rate):
    for frequency in (100, 1_000, 3_000):
        resampled = resample(sine(frequency, rate), rate, new_rate)
        expected = sine(frequency, new_rate)
        assert resampled.shape == expected.shape
        torch.testing.assert_close(resampled[200:-200], expected[200:-200], atol=1e-3, rtol=0)


@pytest.mark.parametrize("frequency", [9_000, 12_000, 20_000])
def test_resampling_does_not_alias(frequency):
    assert resample(sine(frequency, 44_100), 44_100)[200:-200].abs().max() < 1e-3


def test_resampling_to_the_same_rate_changes_nothing():
    signal = sine(440, 16_000)
    assert resample(signal, 16_000) is signal


def test_resampling_keeps_a_constant():
    torch.testing.assert_close(resample(torch.ones(4_410), 44_100)[100:-100], torch.ones(1_400), atol=1e-5, rtol=0)


def test_normalised_signal_has_zero_mean_and_unit_variance():
    signal = normalise(3 + 0.1 * sine(50, 16_000))
    assert signal.mean().abs() < 1e-5
    assert signal.var(correction=0) == pytest.approx(1, abs=1e-3)


def test_synthetic_speech():
    signal = speech_like(4.0)
    assert signal.shape == (64_000,)
    assert signal.dtype == torch.float32
    assert signal.mean().abs() < 1e-4
    assert signal.var() == pytest.approx(1, abs=1e-3)
    assert torch.equal(signal, speech_like(4.0))
    assert not torch.equal(signal, speech_like(4.0, seed=1))
    loudness = signal.unfold(0, 400, 400).square().mean(dim=1)
    assert loudness.max() / loudness.min() > 1e3, "syllables and pauses"
    spectrum = torch.fft.rfft(signal).abs().square()
    low, high = spectrum[400:16_000].sum(), spectrum[16_000:].sum()
    assert low > high, "most of the energy lies below 4 kHz"


def test_synthetic_speech_has_a_length():
    with pytest.raises(AudioError, match="expected a positive length"):
        speech_like(0)
