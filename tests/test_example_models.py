"""The example models are the papers' models: their sizes to the last digit, and what is easy to get wrong in them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models.conformer import Conformer, shift, suppress_weak
from models.deit import DeiT
from models.hubert_student import HubertStudent, frames
from models.transducer import TransducerEncoder, chunk_mask
from torch import nn

import fxreuse

Make = Callable[[], nn.Module]

SIZES: dict[str, tuple[Make, int]] = {
    "Conformer-M": (Conformer, 25_452_800),
    "HuBERT student 432, 816": (HubertStudent, 24_638_752),
    "MaskHuBERT 480, 640": (lambda: HubertStudent(480, 640), 26_635_840),
    "DeiT-tiny": (DeiT, 5_717_416),
}

SMALL: dict[str, tuple[Make, Callable[[], tuple[torch.Tensor, ...]]]] = {
    "conformer": (lambda: Conformer(32, 2, 2, 7, 10), lambda: (torch.randn(2, 11, 32),)),
    "conformer, weak attention": (lambda: Conformer(32, 2, 2, 7, 10, gamma=0.5), lambda: (torch.randn(2, 11, 32),)),
    "student": (
        lambda: HubertStudent(32, 48, 2, 2, 24),
        lambda: (torch.randn(2, 3000), torch.rand(2, frames(3000)) < 0.4),
    ),
    "transducer": (lambda: TransducerEncoder(32, 48, 2, 2, 16, 4), lambda: (torch.randn(2, 60, 16),)),
    "deit": (lambda: DeiT(32, 2, 2, 8, 32, 10), lambda: (torch.randn(2, 3, 32, 32),)),
}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_parameters(name):
    make, parameters = SIZES[name]
    with torch.device("meta"):
        assert count(make()) == parameters


def test_parameters_of_the_transducer_are_those_of_its_projections():
    with torch.device("meta"):
        model = TransducerEncoder()
    linear = [part for part in model.layers.modules() if isinstance(part, nn.Linear)]
    assert len(linear) == 18 * 6
    assert sum(map(count, linear)) == 56_706_048


@pytest.mark.parametrize("name", SMALL)
def test_every_model_is_captured_and_its_maps_are_shared(name):
    make, inputs = SMALL[name]
    model, given = make().eval(), inputs()
    small = fxreuse.apply(model, "2x1", given)
    record = fxreuse.describe(small)
    assert [decision.action for decision in record.decisions] == ["lead", "follow"]
    assert not [note for note in record.notes if note.kind in ("size", "training")]
    assert count(small) == count(model) - record.parameters_removed


def test_shift_puts_every_distance_under_its_key():
    scores = torch.randn(2, 3, 5, 9)
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    assert torch.equal(shift(scores), scores[:, :, rows, 4 - rows + columns])


def test_positions_are_relative():
    """Scores that depend on distance alone are constant along diagonals, up to the normaliser of their row."""
    model = Conformer(16, 1, 2, 1, 8).eval().double()
    attention = model.layers[0].attention
    for projection in (attention.query, attention.key):
        nn.init.zeros_(projection.weight)
        nn.init.zeros_(projection.bias)
    maps = []
    attention.map_dropout.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    model(torch.randn(2, 9, 16, dtype=torch.float64))
    logs = maps[0].log()
    differences = logs[:, :, 1:, 1:] - logs[:, :, :-1, :-1]  # along a diagonal only the row's normaliser changes
    assert torch.allclose(differences, differences[..., :1].expand_as(differences))


def test_weak_attention_is_suppressed():
    attention_map = torch.softmax(3 * torch.randn(2, 2, 6, 6, dtype=torch.float64), -1)
    kept = suppress_weak(attention_map, 0.5)
    weak = attention_map < attention_map.mean(-1, keepdim=True) - 0.5 * attention_map.std(-1, keepdim=True)
    assert weak.any()
    assert torch.equal(kept == 0, weak)
    assert torch.allclose(kept.sum(-1), torch.ones(2, 2, 6, dtype=torch.float64))


def test_chunk_mask():
    seen = chunk_mask(torch.arange(8), 2, 3, 1)
    assert [row.nonzero().flatten().tolist() for row in seen] == [
        [0, 1, 2], [0, 1, 2],
        [0, 1, 2, 3, 4], [0, 1, 2, 3, 4],
        [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6],
        [3, 4, 5, 6, 7], [3, 4, 5, 6, 7],
    ]  # fmt: skip


def test_the_transducer_waits_for_no_later_chunk():
    model = TransducerEncoder(16, 24, 3, 2, 8, 4).eval()
    features = torch.randn(1, 64, 8)
    later = features.clone()
    later[:, 36:] += 1.0  # the third chunk of four frames ends before 10 ms frame 48; the convolutions look 3 ahead
    difference = (model(later) - model(features)).abs().amax((0, 2))
    assert difference[:8].max() == 0
    assert difference[8:].max() > 0


def test_frames_of_the_student():
    model = HubertStudent(16, 24, 1, 2, 8).eval()
    for samples in (16000, 20560, 326000):
        assert frames(samples) == model.front_end(torch.zeros(1, samples)).shape[1]
