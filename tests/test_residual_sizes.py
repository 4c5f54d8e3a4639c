"""The sizes of ResidualTransformer's tables 2, 3 and 5, to the last digit, and of its two uneven baselines.

The models have no weights: sizes are all that is asked. Each is captured once, and its attentions are found once.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from models.transducer import TransducerEncoder

import fxreuse
from fxreuse.finding.find import find
from fxreuse.lay_plan import lay_plan
from fxreuse.program import Program

from .shared_weights import applied, size

apply_module = importlib.import_module("fxreuse.apply")

BASELINE = 56_706_048
SHARING = {3: 18_902_016, 6: 9_451_008, 9: 6_300_672, 18: 3_150_336}
WITH_RESIDUALS = {3: 21_611_520, 6: 12_160_512, 9: 9_010_176, 18: 5_859_840}
RESIDUALS = {16: 2_709_504, 8: 1_382_400, 4: 718_848, 2: 387_072, 1: 221_184}
ROWS = [
    *((f"share k={k}", parameters) for k, parameters in SHARING.items()),
    *((f"residual k={k} r=16", parameters) for k, parameters in WITH_RESIDUALS.items()),
    *((f"residual k=3 r={r}", SHARING[3] + parameters) for r, parameters in RESIDUALS.items() if r < 16),
    ("share k=6 | residual r=16", WITH_RESIDUALS[6]),
    ("residual k=3 r=16 diagonal=no", SHARING[3] + RESIDUALS[16] - 18 * 6 * 512),
    ("share 3+3+3+3+3+2+1", 22_052_352),
    ("share 5+4+5+4", 12_601_344),
]


def projections(program: Program) -> int:
    """Parameters of the layers but for norms, each once."""
    found = {id(p): p.numel() for name, p in program.parameters().items() if "layer" in name and "norm" not in name}
    return sum(found.values())


@pytest.fixture(scope="module")
def transducer():
    with torch.device("meta"):
        model = TransducerEncoder().eval()
        program = apply_module.load_program(model, torch.zeros(2, 64, 80))
    return model, program, find(program)


@pytest.mark.parametrize(("plan", "parameters"), ROWS)
def test_transducer(transducer, plan, parameters):
    _, program, sites = transducer
    assert projections(program) == BASELINE
    small, record = lay_plan(program, sites, fxreuse.Plan.parse(plan), lambda: None)
    assert projections(small) == parameters
    assert record.parameters_removed - record.parameters_added == BASELINE - parameters


@pytest.mark.parametrize(
    ("plan", "parameters"), [("residual k=3 r=16", 21_611_520), ("share 3+3+3+3+3+2+1", 22_052_352)]
)
def test_what_apply_returns(transducer, plan, parameters):
    model, program, _ = transducer
    small = applied(model, program, plan)
    assert size(small) - parameters == size(model) - BASELINE
    assert sum(tensor.numel() for tensor in small.state_dict().values()) == size(small)


def test_the_paper_s_smallest_good_one():
    assert round(100 * (SHARING[3] + RESIDUALS[2]) / BASELINE, 2) == 34.02


def test_a_hugging_face_encoder_of_that_shape():
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 18, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=100), add_pooling_layer=False).eval()
        inputs = {"input_ids": torch.zeros(2, 7, dtype=torch.long)}
    program = apply_module.load_program(model, inputs)
    for plan, parameters in (("residual k=3 r=16", 21_611_520), ("share k=9", 6_300_672)):
        assert size(applied(model, program, plan)) - parameters == size(model) - BASELINE
