"""The demonstration: one model, one plan, ten seconds of audio, each step from finding attention to the verdict."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from tabulate import tabulate

import fxreuse
from fxreuse import cost_model

from ..attention import AttentionSites
from ..emission.rewritten import Rewritten
from ..errors import InputError
from ..finding.find import find
from ..frontend.inputs import bind, normalise
from ..frontend.load import load_program
from ..program import Program
from ..record import Record
from . import audio, model_spec
from .progress import Progress

DEFAULT_MODEL = "transformers:HubertConfig"
DEFAULT_PLAN = "2x6"
DEFAULT_SECONDS = 10.0

_WEIGHTS = {
    "random": "random, drawn from a fixed seed: sizes, speed and the check are those of trained ones, the outputs mean "
    "nothing (for trained ones: --model hf:facebook/hubert-base-ls960)",
    "trained": "trained, from the checkpoint",
    "factory": "as the factory made them",
}

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Request:
    """What to demonstrate: a model as the command line names it, a plan, and the audio."""

    model: str = DEFAULT_MODEL
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    plan: str = DEFAULT_PLAN
    audio: Path | None = None
    seconds: float = DEFAULT_SECONDS


@dataclasses.dataclass(frozen=True)
class Result:
    """What the demonstration found; `to_json` gives all of it."""

    request: Request
    weights: str
    inputs: str
    sites: AttentionSites
    record: Record
    before: cost_model.Numbers
    after: cost_model.Numbers
    verification: fxreuse.Verification
    took: Mapping[str, float]

    @property
    def passed(self) -> bool:
        """Whether the check's verdict is good."""
        return self.verification.passed

    def to_json(self) -> str:
        """Everything that the run found, as JSON."""
        return json.dumps(
            {
                "model": self.request.model,
                "settings": dict(self.request.settings),
                "weights": self.weights,
                "plan": self.request.plan,
                "inputs": self.inputs,
                "sites": [str(site) for site in self.sites],
                "record": dataclasses.asdict(self.record),
                "before": dataclasses.asdict(self.before),
                "after": dataclasses.asdict(self.after),
                "verification": json.loads(self.verification.to_json()),
                "passed": self.passed,
                "seconds": dict(self.took),
            },
            indent=2,
            ensure_ascii=False,
        )


def run(request: Request, say: Callable[[str], None] = print) -> Result:
    """Load, find, apply, count and verify, and say what each step found.

    Args:
        request: what to run on.
        say: takes every finding, as text, when it is there.

    Returns:
        All findings as data.

    Raises:
        FxReuseError: the model, the audio or the plan cannot be served; the message says why.
    """
    took: dict[str, float] = {}

    def step(name: str, work: Callable[[Progress], _T]) -> _T:
        """Run one step under a progress line, and keep its time."""
        with Progress() as progress:
            progress(name)
            begun = time.perf_counter()
            result = work(progress)
            took[name] = round(time.perf_counter() - begun, 2)
        return result

    loaded = step("loading the model", lambda _: model_spec.resolve(request.model, request.settings))
    inputs, description = _inputs(request, loaded)
    model = loaded.model
    say(f"model    {request.model}, {type(model).__name__}")
    say(f"weights  {_WEIGHTS[loaded.weights]}")
    say(f"inputs   {description}")
    say(f"plan     {request.plan}")

    program = step("capturing the model", lambda _: load_program(model, inputs))
    sites = step("finding the attentions", lambda _: find(program))
    say(f"\n── the {len(sites)} attentions of the model\n{sites}")
    small = step("applying the plan", lambda _: fxreuse.apply(model, request.plan, inputs))
    record = fxreuse.describe(small)
    say(f"\n── what was done\n{record}")
    assert isinstance(small, Rewritten)
    sizes = _sizes(model, inputs)
    before, after = step("counting", lambda _: (_numbers(program, sizes), _numbers(small.program, sizes)))
    verification = step("verifying", lambda progress: fxreuse.verify(model, small, inputs, progress=progress))
    say(f"\n── before and after\n{_comparison(before, after, verification)}")
    say(f"\n── the check\n{verification}")
    say(f"\n{_verdict(verification)} ({sum(took.values()):.0f} s in all)")
    return Result(request, loaded.weights, description, sites, record, before, after, verification, took)


def _inputs(request: Request, loaded: model_spec.LoadedModel) -> tuple[Any, str]:
    """The example inputs, and what they are in words: the factory's, or audio for a model that hears, or inferred."""
    if getattr(loaded.model, "main_input_name", None) == "input_values" and loaded.example_inputs is None:
        wave, source = _waveform(request)
        samples = f"1 × {wave.numel():,} samples at {audio.SPEECH_RATE / 1000:g} kHz"
        return {"input_values": wave[None]}, f"{wave.numel() / audio.SPEECH_RATE:.1f} s of {source}: {samples}"
    if request.audio is not None:
        raise InputError(
            f"--audio {str(request.audio)!r}: {request.model} takes no waveform (its inputs are its factory's own, "
            "or not called input_values); leave --audio out, or name a model such as transformers:HubertConfig"
        )
    if loaded.example_inputs is not None:
        return loaded.example_inputs, "the factory's own example inputs"
    return None, "inferred from the model"


def _waveform(request: Request) -> tuple[torch.Tensor, str]:
    """The audio as a speech model takes it, of shape (samples,), and where it came from."""
    if not 0 < request.seconds < math.inf:
        raise InputError(f"--seconds: expected a positive number, found {request.seconds:g}")
    if request.audio is None:
        return audio.speech_like(request.seconds), "synthetic speech"
    wave, rate = audio.read_wav(request.audio)
    wave = audio.resample(wave[: round(request.seconds * rate)], rate)
    return audio.normalise(wave), request.audio.name


def _sizes(model: torch.nn.Module, inputs: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the inputs by name: the counts are for these, not for the batch that the capture chose."""
    bound = bind(model, normalise(model, inputs))
    return {name: tuple(value.shape) for name, value in bound.items() if isinstance(value, torch.Tensor)}


def _numbers(program: Program, sizes: Mapping[str, tuple[int, ...]]) -> cost_model.Numbers:
    return cost_model.summarise(program, sizes).at_example()


def _comparison(before: cost_model.Numbers, after: cost_model.Numbers, verification: fxreuse.Verification) -> str:
    """Original and rewritten model side by side: what is counted, then what was measured."""
    rows = [
        _row("parameters", before.params, after.params, "{:,}"),
        _row("MACs", before.macs, after.macs, "{:,}"),
        _row("attention maps, bytes", before.map_bytes, after.map_bytes, "{:,}"),
    ]
    if verification.speed is not None:
        latency = {name: 1e3 * timing.seconds.median for name, timing in verification.speed.latency.items()}
        peak = {name: count / 2**20 for name, count in verification.speed.peak_bytes.items()}
        measured = [("latency, ms", latency, "{:.1f}"), ("peak memory, MiB", peak, "{:.1f}")]
        for what, found, form in measured:
            ways = [name.removeprefix("original ") for name in found if name.startswith("original ")]
            rows += [_row(f"{what}, {way}", found[f"original {way}"], found[f"rewritten {way}"], form) for way in ways]
    headers = ["", "before", "after", "before / after"]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", "right", "right", "right"))


def _row(name: str, before: float, after: float, form: str) -> list[str]:
    """One line of the table, with the ratio where there is one."""
    return [name, form.format(before), form.format(after), f"{before / after:.2f}×" if after else ""]


def _verdict(verification: fxreuse.Verification) -> str:
    """The verdict in one line."""
    if verification.passed:
        return "passed: the rewritten model computes what the plan says"
    return "failed, for the reasons that the check gives above"
