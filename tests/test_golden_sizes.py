"""The papers' sizes, to the last digit: plans applied to the models that they start from.

A model is captured once for all its rows: no pass changes the program that it is given.
"""

from __future__ import annotations

import pytest
import sympy
import torch
from models.conformer import Conformer
from models.hubert_student import HubertStudent, frames

import fxreuse
from benchmarks.papers import UTTERANCES
from fxreuse.cost_model import summarise
from fxreuse.cost_model.parts import Parts
from fxreuse.cost_model.presets import SERVER_CPU
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program
from fxreuse.program import Program
from fxreuse.reports.cost_report import CostReport

from .handwritten import exported
from .running import apply_captured

# Table 2 of Recycle-and-Distill, and its MaskHuBERT and ARMHuBERT: width, feed-forward width, plan, parameters, and the
# feed-forward width that comes out, and the multiply-accumulates over the 32 utterances.
ARMHUBERT = [
    (432, 816, "6by2", 20_897_632, 816, 423_530_225_568),
    (432, 816, "3by4", 21_645_856, 816, 436_737_427_200),
    (432, 816, "2by6", 22_394_080, 816, 449_944_628_832),
    (432, 816, "1x12", 24_638_752, 816, 489_566_233_728),
    (432, 816, "6by2 ffn=match:2by6", 22_392_352, 960, 440_286_074_784),
    (432, 816, "3by4 ffn=match:2by6", 22_393_216, 888, 445_115_351_808),
    (480, 640, "1x12", 26_635_840, 640, 519_790_484_736),
    (480, 640, "2by6 ffn=864", 26_448_448, 864, 501_624_271_296),
]

# Map reuse: parameters by number of groups (table 3 of the ICLR paper), and the rows of its table 2. The Conformer has
# four heads, so that (H4) changes nothing.
CONFORMER = {16: 25_452_800, 8: 24_922_368, 4: 24_657_152, 3: 24_590_848, 2: 24_524_544}
CONFORMER_PLANS = [
    ("1x16", 16),
    ("2x8", 8),
    ("4x4", 4),
    ("4(H4)+4(H4)+8(H4)", 3),
    ("8(H4)+4(H4)+4(H4)", 3),
    ("8x2", 2),
    ("4(H8)+4(H8)+4(H8)+4(H8)", 4),
    ("4(H2)+4(H2)+4(H4)+4(H4)", 4),
    ("4(H8)+4(H8)+4(H4)+4(H4)", 4),
    ("4(H4)+4(H4)+4(H2)+4(H2)", 4),
    ("4(H4)+4(H4)+4(H8)+4(H8)", 4),
    ("8(H8)+8(H8)", 2),
]

Captured = tuple[torch.nn.Module, Program]


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def students() -> dict[tuple[int, int], Captured]:
    """The students without weights: sizes are all that is asked."""
    made = {}
    with torch.device("meta"):
        inputs = torch.zeros(2, 3000), torch.zeros(2, frames(3000), dtype=torch.bool)
        for sizes in ((432, 816), (480, 640)):
            model = HubertStudent(*sizes).eval()
            made[sizes] = model, load_program(model, inputs)
    return made


@pytest.mark.parametrize(("dim", "width", "plan", "parameters", "wider", "macs"), ARMHUBERT)
def test_armhubert(students, dim, width, plan, parameters, wider, macs):
    model, program = students[dim, width]
    small = apply_captured(model, program, f"{plan} lowering=materialize")
    record = fxreuse.describe(small)
    assert count(small) == parameters
    assert count(model) - record.parameters_removed + record.parameters_added == parameters
    linear = {name: part for name, part in small.named_modules() if isinstance(part, torch.nn.Linear)}
    assert {part.out_features for name, part in linear.items() if name.endswith("fc1")} == {wider}
    assert {part.in_features for name, part in linear.items() if name.endswith("fc2")} == {wider}
    counted = summarise(small.program).macs
    sizes = {str(symbol): symbol for symbol in counted.free_symbols}
    utterances = [{"B": 1, "T": frames(samples), "waveform_1": samples} for samples in UTTERANCES]
    assert sum(counted.xreplace({sizes[n]: sympy.Integer(v) for n, v in u.items()}) for u in utterances) == macs
    followers = [decision for decision in record.decisions if decision.action == "follow"]
    assert record.parameters_removed == len(followers) * 2 * (dim * dim + dim)


@pytest.fixture(scope="module")
def conformer() -> Captured:
    model = Conformer().eval()
    return model, exported(model, torch.randn(2, 16, 256))


def test_conformer_layers(conformer):
    """The multiply-accumulates of a layer with relative positions, and of a follower with wider values."""
    model, program = conformer
    parts = Parts.of(program, find(program))
    before, after = (
        summarise(p, parts=parts) for p in (program, apply_captured(model, program, "4x4 values=2").program)
    )
    t, d = before.symbols["T"], 256
    full = 4 * d * t**2 + (25 * d**2 + 30 * d) * t - d**2
    follower = 2 * d * t**2 + (23 * d**2 + 31 * d) * t
    for summary, layer, expected in (
        (before, 3, full), (after, 0, full), (after, 3, follower),
    ):  # fmt: skip
        found = summary.counts.macs_by_layer[f"layers.{layer}"]
        assert sympy.expand(found.subs(summary.symbols["B"], 1) - expected) == 0
    shares = [part.params / before.params for part in _breakdown(before, parts)]
    assert [round(100 * share) for share in shares] == [21, 0, 66, 13, 0]


def _breakdown(summary, parts):
    return CostReport("", "", summary, summary, parts, (), None, ({"B": 1, "T": 16},), SERVER_CPU).breakdown()["before"]


@pytest.mark.parametrize(("groups", "count_of_groups"), CONFORMER_PLANS)
def test_conformer(conformer, groups, count_of_groups):
    """With values twice as wide. The rows run, at another length than that of the capture.

    Relative positions save more than wider values cost, so there is no note that nothing is gained.
    """
    small = apply_captured(*conformer, f"{groups} values=2")
    record = fxreuse.describe(small)
    assert count(small) == CONFORMER[count_of_groups]
    assert count(conformer[0]) - record.parameters_removed + record.parameters_added == CONFORMER[count_of_groups]
    assert any(note.kind == "cost" for note in record.notes) == (count_of_groups == 16)
    assert sum(decision.action == "follow" for decision in record.decisions) == 16 - count_of_groups
    with torch.no_grad():
        logits = small(torch.randn(1, 9, 256))
    assert logits.shape == (1, 9, 129)
    assert logits.isfinite().all()
