"""What a row of the coverage table is: a model, how it is called, and the attentions that it is known to have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fxreuse.frontend.inputs import Inputs as Call
from fxreuse.frontend.target import captured_inputs

Inputs = Call | tuple[Any, ...] | dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Built:
    """A model and two calls of it; ``other`` differs from ``inputs`` in every size that the model's code leaves free.

    ``reference`` is a model of the same parameters that calls softmax where ``model`` writes it out, so that the eager
    reference can see it; left out where the model does that itself.
    """

    model: torch.nn.Module
    inputs: Inputs
    other: Inputs
    reference: torch.nn.Module | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One architecture.

    ``sites`` is written down from the architecture's definition, never from what was found: what repeats, and how
    often (``{"encoder self": 4, "decoder cross": 2}``). Every part is expected as one stack of so many layers.
    ``plans`` has, by a piece of a stack's name, the groups to share within where pairs of layers cannot; ``whole`` says
    that the parts are counted only in total, since the model has them in one sequence. ``not_attention`` is the number
    of softmaxes that are none and must be rejected. ``target`` is the submodule that is captured, with what the model
    gives it, where the Python around it cannot be. ``needs`` is the package that the model comes from. ``note`` says
    what a reader of the table has to know about the row; ``refused`` has the reasons of `verdict.REASONS` for which a
    lowering (``"recompute"``) or the ``"whole"`` model is refused.
    """

    name: str
    family: str
    sites: Mapping[str, int]
    build: Callable[[], Built]
    plans: Mapping[str, str] = dataclasses.field(default_factory=dict)
    whole: bool = False
    not_attention: int = 0
    target: str | None = None
    needs: str = "torch"
    note: str = ""
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def expected(self) -> int:
        """The number of attentions."""
        return sum(self.sites.values())

    @property
    def source(self) -> str:
        """Where that number comes from."""
        return " + ".join(f"{count} {part}" for part, count in self.sites.items()) or "none"

    @property
    def known(self) -> dict[str, Any]:
        """What stands in the table before anything is run."""
        said = {"note": self.note} if self.note else {}
        sites = {"expected": self.expected, "source": self.source, "rejected_expected": self.not_attention}
        return {"family": self.family, **sites, "refused_expected": dict(self.refused), **said}

    def seeded(self) -> Built:
        """The model, with weights under which maps are sharp and biases count."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built = self.build()
            randomise(built.model)
            if built.reference is not None:
                built.reference.load_state_dict(built.model.state_dict())
                built.reference.eval()
        return built if self.target is None else _within(built, self.target)


def _within(built: Built, target: str) -> Built:
    """The submodule at a path, with what the model gives it in both calls."""
    inner, inputs = captured_inputs(built.model, target, built.inputs)
    return Built(inner, inputs, captured_inputs(built.model, target, built.other)[1])


def randomise(model: torch.nn.Module, gain: float = 1.2) -> None:
    """Random weights for a check: the usual initial ones give uniform maps and zero biases, which hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                fan_in = max(1, parameter[:1].numel())
                parameter.copy_(gain * fan_in**-0.5 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    model.eval()


VOCABULARY = 99


def ids(batch: int, length: int) -> torch.Tensor:
    """Token numbers, none of them a special one."""
    return torch.randint(5, VOCABULARY, (batch, length))


def padding(batch: int, length: int, left: bool = False) -> torch.Tensor:
    """A padding mask of ones whose last row ends (or begins) with zeros."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, slice(None, length // 3) if left else slice(length - length // 3, None)] = 0
    return mask


def tokens(model: torch.nn.Module, name: str = "input_ids", left: bool = False, padded: bool = True) -> Built:
    """A model of tokens, called at 2×11 and 3×14, the last row padded."""

    def call(batch: int, length: int) -> dict[str, Any]:
        mask = {"attention_mask": padding(batch, length, left)} if padded else {}
        return {name: ids(batch, length), **mask}

    return Built(model, call(2, 11), call(3, 14))


def pairs(model: torch.nn.Module, source: str = "input_ids", padded: bool = True) -> Built:
    """A model of source and target tokens, called at 2×11→7 and 3×14→9, the last source padded."""

    def call(batch: int, length: int, target: int) -> dict[str, Any]:
        mask = {"attention_mask": padding(batch, length)} if padded else {}
        return {source: ids(batch, length), **mask, "decoder_input_ids": ids(batch, target)}

    return Built(model, call(2, 11, 7), call(3, 14, 9))


def images(model: torch.nn.Module, side: int = 32, name: str = "pixel_values", **more: Any) -> Built:
    """A model of square images, called with 2 and with 3 of them."""
    return Built(model, *({name: torch.randn(batch, 3, side, side), **more} for batch in (2, 3)))


def samples(model: torch.nn.Module, name: str = "input_values", padded: bool = True, longer: int = 301) -> Built:
    """A model of audio samples, called at 2×230 and at 3×301 or a length of its own, the last row padded."""

    def call(batch: int, length: int) -> dict[str, Any]:
        mask = {"attention_mask": padding(batch, length)} if padded else {}
        return {name: torch.randn(batch, length), **mask}

    return Built(model, call(2, 230), call(3, longer))


def states(model: torch.nn.Module, width: int = 16) -> Built:
    """A model of hidden states, called at 2×5 and 3×7."""
    return Built(model, (torch.randn(2, 5, width),), (torch.randn(3, 7, width),))
