"""Comparing what two models give: the largest error over all tensors of their outputs, in honest float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


@dataclasses.dataclass(frozen=True)
class Difference:
    """How two outputs differ.

    ``error`` is the largest absolute error of a tensor relative to the largest magnitude expected in it, over all
    tensors; ``where`` names the tensor that has it. ``faults`` says what could not be compared, and why.
    """

    error: float
    where: str
    compared: int
    faults: tuple[str, ...] = ()

    def merged(self, other: Difference) -> Difference:
        """Both together: the larger error, the faults of both."""
        worst = self if self.error >= other.error else other
        return Difference(worst.error, worst.where, self.compared + other.compared, self.faults + other.faults)


def difference(expected: Any, found: Any) -> Difference:
    """Compare two outputs tensor by tensor.

    NaN equals NaN and an infinity itself; tensors that are not floating point have to be equal. The key-value cache of
    the expected output (``past_key_values``) may be missing.

    Args:
        expected: any nest of tensors.
        found: the one that is compared with it.

    >>> difference({"a": torch.tensor([1.0, 10.0])}, {"a": torch.tensor([1.5, 10.0])})
    Difference(error=0.05, where='a', compared=1, faults=())
    >>> difference((torch.ones(2),), (torch.ones(3),)).faults
    ('output [0]: expected shape (2,), found (3,)',)
    """
    wanted, given = named_tensors(expected), named_tensors(found)
    missing = [name for name in wanted if name not in given and not name.startswith("past_key_values")]
    faults = [f"output {_shown(name)}: expected, not found" for name in missing]
    faults += [f"output {_shown(name)}: found, not expected" for name in given if name not in wanted]
    errors: dict[str, float] = {}
    for name in (name for name in wanted if name in given):
        left, right = wanted[name], given[name]
        if left.shape != right.shape:
            faults.append(f"output {_shown(name)}: expected shape {tuple(left.shape)}, found {tuple(right.shape)}")
        elif left.is_floating_point() != right.is_floating_point():
            faults.append(f"output {_shown(name)}: expected {left.dtype}, found {right.dtype}")
        else:
            errors[name] = tensor_error(left, right)
    if not errors and not faults:
        faults.append("the outputs hold no tensors, so there is nothing to compare")
    worst = max(errors, key=errors.__getitem__, default="")
    return Difference(errors.get(worst, 0.0), worst, len(errors), tuple(faults))


def _shown(name: str) -> str:
    return name or "(the tensor)"


def tensor_error(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest absolute error, relative to the largest finite magnitude of what is expected.

    >>> tensor_error(torch.tensor([float("nan"), 4.0]), torch.tensor([float("nan"), 3.0]))
    0.25
    >>> tensor_error(torch.tensor([1, 2]), torch.tensor([1, 3]))
    inf
    """
    expected, found = expected.detach().cpu(), found.detach().cpu()
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(expected, found) else math.inf
    wide = torch.complex128 if expected.is_complex() else torch.float64
    expected, found = expected.to(wide), found.to(wide)
    same = (expected == found) | (expected.isnan() & found.isnan())
    errors = torch.where(same, 0.0, (expected - found).abs())
    if not errors.isfinite().all():
        return math.inf
    magnitudes = expected.abs()
    scale = magnitudes[magnitudes.isfinite()].amax().item() if magnitudes.isfinite().any() else 0.0
    largest = errors.amax().item() if errors.numel() else 0.0
    return largest / scale if scale else largest


def named_tensors(output: Any, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of an output, by the name that leads to each.

    >>> list(named_tensors({"logits": torch.ones(1), "states": (torch.ones(1), None, torch.ones(1))}))
    ['logits', 'states[0]', 'states[2]']
    """
    if isinstance(output, torch.Tensor):
        return {name: output}
    if isinstance(output, Mapping):
        parts = [(f"{name}.{key}" if name else str(key), value) for key, value in output.items()]
    elif isinstance(output, (tuple, list)):
        parts = [(f"{name}[{index}]", value) for index, value in enumerate(output)]
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = [field.name for field in dataclasses.fields(output)]
        parts = [(f"{name}.{field}" if name else field, getattr(output, field)) for field in fields]
    else:
        leaves = pytree.tree_leaves(output)
        parts = [(f"{name}[{index}]", leaf) for index, leaf in enumerate(leaves) if leaf is not output]
    found: dict[str, torch.Tensor] = {}
    for part, value in parts:
        found.update(named_tensors(value, part))
    return found


class KeepFloat64(TorchDispatchMode):
    """While it is on, a float64 tensor that is cast to float32 stays float64.

    Models cast to float32 for precision (norms, rotary tables, the softmax of half-precision models); in a float64 copy
    of a model the same cast would lose it, and with it the difference between rounding and error.

    >>> with KeepFloat64():
    ...     torch.ones(2, dtype=torch.float64).float().dtype
    torch.float64
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        of_float64 = args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if of_float64 and kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
