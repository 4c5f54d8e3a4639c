"""The models, plans and sizes on which predicted latency is compared with measured: see `latency_prediction.py`.

Every plan comes with values as they are and with followers' values twice as wide. The second is the setting of the
first study of map reuse, which keeps the number of parameters; the ratio of multiply-accumulates is then 1 without
relative positions, whatever the gain in time. Conformer-M runs at the lengths of that study, the others at theirs.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxreuse.apply import rewrite
from fxreuse.cost_model.summary import Summary, summarise
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program
from fxreuse.plans.plan import Plan
from fxreuse.program import Program

ROOT = Path(__file__).parent
PREPARED = Path(tempfile.gettempdir()) / "fxreuse_latency_prediction"
sys.path.insert(0, str(ROOT.parent / "examples"))

from models.conformer import Conformer  # noqa: E402

LOWERINGS = ("materialize", "recompute")
VALUES = ("", " values=2")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, groups for it, and the sizes at which it is run, each with the inputs that have it."""

    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[..., Any]
    example: dict[str, int]
    sizes: tuple[dict[str, int], ...]
    groups: tuple[str, ...]

    @property
    def plans(self) -> tuple[str, ...]:
        """Every plan, without a lowering."""
        return tuple(groups + values for groups in self.groups for values in VALUES)


def conformer() -> Case:
    sizes = tuple({"B": 1, "T": length} for length in (128, 256, 512, 768, 1024))
    return Case(
        "Conformer-M", Conformer, lambda B, T: (torch.randn(B, T, 256),), {"B": 1, "T": 16}, sizes, ("4x4", "8x2")
    )


def hubert() -> Case:
    import transformers

    def build() -> nn.Module:
        model = transformers.HubertModel(transformers.HubertConfig())
        convolution = model.encoder.pos_conv_embed.conv  # with one weight, as inference wants it; and it can be saved
        nn.utils.parametrize.remove_parametrizations(convolution, "weight")
        convolution._load_state_dict_pre_hooks.clear()
        return model

    sizes = tuple({"B": 1, "input_values_1": 16000 * seconds} for seconds in (2, 5, 10))
    example = {"B": 1, "input_values_1": 16000}
    return Case(
        "HuBERT-base",
        build,
        lambda B, input_values_1: (torch.randn(B, input_values_1),),
        example,
        sizes,
        ("4x3", "2x6"),
    )


def bert() -> Case:
    import transformers

    def build() -> nn.Module:
        return transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)

    sizes = tuple({"B": 1, "T": length} for length in (128, 256, 512))
    return Case(
        "BERT-base",
        build,
        lambda B, T: {"input_ids": torch.randint(5, 1000, (B, T))},
        {"B": 1, "T": 16},
        sizes,
        ("4x3", "2x6"),
    )


def vit(side: int, batches: tuple[int, ...]) -> Case:
    import transformers

    def build() -> nn.Module:
        return transformers.ViTModel(transformers.ViTConfig(image_size=side), add_pooling_layer=False)

    sizes = tuple({"B": batch} for batch in batches)
    return Case(f"ViT-B, {side}²", build, lambda B: (torch.randn(B, 3, side, side),), {"B": 1}, sizes, ("4x3", "2x6"))


CASES: dict[str, Callable[[], Case]] = {
    "conformer": conformer,
    "hubert": hubert,
    "bert": bert,
    "vit224": lambda: vit(224, (1, 4)),
    "vit384": lambda: vit(384, (1,)),
}


def variants(case: Case) -> tuple[dict[str, nn.Module], dict[str, Program]]:
    """The model as given, and rewritten by every plan in both lowerings; and the program of each."""
    torch.manual_seed(0)
    model = case.build().eval()
    program = load_program(model, case.inputs(**case.example))
    sites = find(program)
    models, programs = {"original": model}, {"original": program}
    for plan in case.plans:
        for lowering in LOWERINGS:
            wanted = f"{plan} lowering={lowering}"
            small = rewrite(program, sites, Plan.of(wanted), model)
            models[wanted], programs[wanted] = small, small.program
    return models, programs


def prepared(name: str) -> dict[str, nn.Module]:
    """The models of a case, kept in a file."""
    PREPARED.mkdir(exist_ok=True)
    path = PREPARED / f"{name}.pt"
    if not path.exists():
        part = path.with_suffix(".part")
        torch.save(variants(CASES[name]())[0], part)
        part.replace(path)
    models: dict[str, nn.Module] = torch.load(path, weights_only=False)
    return models


def summaries(name: str) -> dict[str, Summary]:
    """What every form of a case costs."""
    return {kind: summarise(program) for kind, program in variants(CASES[name]())[1].items()}
