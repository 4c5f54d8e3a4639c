"""What a device can do, as the latency model needs it: a few rates, read from a datasheet or measured here.

`Device.measure` finds the numbers of the machine that it runs on (`calibrate`), `Device.preset` has those of some GPUs
(`presets`). Everything is in seconds, bytes and multiply-accumulates (MACs).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import InputError, UnsupportedError
from .attention_blocks import KEY_BLOCK, query_block

#: Families of matrix products, each with kernels of its own. ``attention`` is the fused one.
PRODUCTS = ("linear", "batched", "convolution", "depthwise", "attention")

#: What bytes are moved for: to be read once, or written once, or as operands and results of products with weights, or
#: of other products.
USES = ("read", "write", "linear", "batched")

# Numbers in a vector register of a CPU.
_LANES = 16


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast a family of matrix products runs: (batch × m × k) · (batch × k × n).

    ``macs`` is the rate of a large one, in MACs per second. ``half`` are the sizes m, n and k, each alone, that halve
    it: a product takes MACs / rate · (1 + m₀/m + n₀/n + k₀/k), where the last three terms stand for the operands that
    are packed and the result that is written. ``ragged`` is how much longer, as a part, it takes where n is not a whole
    number of vectors; only fused attention has it.

    >>> Rate(1e9, (0, 0, 64)).seconds(1, 1000, 1000, 64)
    0.128
    """

    macs: float
    half: tuple[float, float, float] = (0.0, 0.0, 0.0)
    ragged: float = 0.0

    def seconds(self, batch: float, m: float, n: float, k: float) -> float:
        """The time of a product of these sizes, its operands in cache."""
        if not batch * m * n * k:
            return 0.0
        return batch * m * n * k / self.macs * (1 + sum(h / size for h, size in zip(self.half, (m, n, k), strict=True)))


@dataclasses.dataclass(frozen=True)
class Device:
    """A device for `fxreuse.cost_model.latency.predict_latency`.

    Attributes:
        name: for people, and the name of a preset.
        kind: ``"cpu"``, ``"cuda"`` …
        threads: how many run one operator; 1 for an accelerator.
        products: the rate of every family of `PRODUCTS`, in float32.
        dtypes: how many times as fast as in float32 matrix products run in a dtype, by its name.
        elements: seconds per element of operators that are no products, operands in cache and all threads at work, by
            kind: ``"add"``, ``"gelu"``, ``"softmax"``, ``"strided"`` …
        score: seconds per score, beside the products, in fused attention; ``masked_score`` with a mask in memory.
        ragged: seconds per element of a product's result that is not in the cores' own caches, where its rows do not
            end with a line of cache; ``ragged_memory`` is what it is more where the result comes from memory.
        memory: bytes per second to and from memory.
        cache: bytes of the last-level cache that one process can count on.
        cache_rate: bytes per second to and from that cache.
        own_cache: bytes of the caches that belong to the cores alone; 0 for an accelerator.
        retention: seconds after which others who share the last-level cache have pushed half of one's bytes out.
        outer_miss: on a CPU, seconds per byte that it takes, on top of the work, to go through bytes that are not in
            the cores' own caches. In the rates of products it is contained.
        memory_miss: seconds per byte that it takes longer where they are not in the last-level cache either, by what
            they are moved for, one of `USES`.
        overhead: seconds per operator that do not depend on sizes, by kind: ``"view"``, ``"element"``, ``"linear"``,
            ``"map"`` …; with ``"compiled "`` in front, of a kernel of a compiled graph.
        grain: elements below which an operator is not spread over threads.
        fault: seconds per byte of new pages; 0 where an allocator keeps all memory that it has once had.
        asynchronous: whether operators are queued while earlier ones run, and memory is read while others compute, so
            that overhead and memory hide behind work.
        source: where the numbers are from.
    """

    name: str
    kind: str
    threads: int
    products: Mapping[str, Rate]
    dtypes: Mapping[str, float]
    elements: Mapping[str, float]
    score: float
    masked_score: float
    memory: float
    cache: float
    cache_rate: float
    overhead: Mapping[str, float]
    grain: int = 32768
    ragged: float = 0.0
    ragged_memory: float = 0.0
    fault: float = 0.0
    asynchronous: bool = False
    source: str = ""
    own_cache: float = 0.0
    retention: float = math.inf
    outer_miss: float = 0.0
    memory_miss: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def product(self, family: str, batch: float, m: float, n: float, k: float, dtype: torch.dtype) -> float:
        """Seconds of a matrix product, its operands in cache.

        A CPU takes as long for a few columns, less than a vector of them, as for two whole vectors; and so do the
        heads of a fused attention, whose two widths are ``k``. It computes that in blocks: ``m`` counts as that of one.

        Raises:
            InputError: where the device has no rate for that dtype.
        """
        if self.kind == "cpu" and family == "attention":
            return self._in_blocks(batch, m, n, k) / self.faster(dtype)
        if self.kind == "cpu" and family != "depthwise":
            n = n if n >= _LANES else 2 * _LANES
        return self.products[family].seconds(batch, m, n, k) / self.faster(dtype)

    def _in_blocks(self, batch: float, queries: float, keys: float, width: float) -> float:
        """Seconds of the products of a fused attention on a CPU."""
        rate = self.products["attention"]
        width = width if width >= 2 * _LANES else 4 * _LANES
        macs, packed, ragged = block_work(batch, queries, keys, width)
        return (macs + rate.half[0] * packed + rate.ragged * ragged) / rate.macs

    def faster(self, dtype: torch.dtype) -> float:
        """How many times as fast as in float32 matrix products run.

        Raises:
            InputError: where the device has no rate for that dtype.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in self.dtypes:
            raise InputError(
                f"The device {self.name!r} has no rate for matrix products in {name}; it has those for "
                f"{', '.join(self.dtypes)}. Predict the model in one of them, or describe the device with "
                "dataclasses.replace(device, dtypes=…)."
            )
        return self.dtypes[name]

    def element(self, kind: str) -> float:
        """Seconds per element of an operator; of plain arithmetic where the kind is not known."""
        return self.elements.get(kind, self.elements["add"])

    def missed(self, use: str, outer: float, memory: float) -> float:
        """Seconds that it takes on a CPU, on top of the work, that so many bytes are not in the cores' own caches, and
        so many of them not in the last-level cache either.

        Arguments:
            use: what they are moved for, one of `USES`.
            outer: bytes.
            memory: bytes.
        """
        near = outer * self.outer_miss if use in ("read", "write") else 0.0
        return near + memory * self.memory_miss.get(use, 0.0)

    def dispatch(self, kind: str, compiled: bool = False) -> float:
        """Seconds per operator that do not depend on sizes."""
        if compiled:
            return self.overhead.get(f"compiled {kind}", self.overhead["compiled element"])
        return self.overhead.get(kind, self.overhead["element"])

    @classmethod
    def measure(cls, *, again: bool = False, progress: Callable[[str], None] | None = None) -> Device:
        """The CPU of this machine with the threads that torch has now.

        It takes less than ten seconds, once: the result is kept in the user's cache directory
        (``$XDG_CACHE_HOME/fxreuse``), by machine, version of torch and number of threads.

        Args:
            again: measure anew, whatever is kept.
            progress: called with a line of text as each step begins.

        Raises:
            UnsupportedError: there is nowhere to run.
        """
        from . import calibrate

        return calibrate.measured(again=again, progress=progress)

    @classmethod
    def typical_cpu(cls) -> Device:
        """A CPU to decide by where nobody waits for a measurement: this one, if it was measured, or one like many."""
        from .calibrate import kept
        from .presets import SERVER_CPU

        return kept(torch.get_num_threads()) or SERVER_CPU

    @classmethod
    def preset(cls, name: str) -> Device:
        """A GPU by name: ``"RTX Titan"``, ``"A100"``, ``"H100"``, ``"H200"``; case and blanks do not matter.

        Raises:
            InputError: there is none of that name.

        >>> Device.preset("h200").memory
        4800000000000.0
        """
        from .presets import PRESETS

        wanted = _plain(name)
        for preset in PRESETS:
            if _plain(preset.name) == wanted:
                return preset
        names = ", ".join(repr(preset.name) for preset in PRESETS)
        raise InputError(
            f"There is no device {name!r}. Known are {names}, and 'cpu' for this machine, which is measured."
        )

    @classmethod
    def of(cls, device: Device | torch.device | str, *, progress: Callable[[str], None] | None = None) -> Device:
        """A device from what a person names: one, the name of a preset, or ``"cpu"`` for this machine, measured.

        ``"cuda"`` is the preset of the GPU that is there.

        Raises:
            InputError: the name is not known, or the GPU that is there has no preset.
        """
        if isinstance(device, Device):
            return device
        if not isinstance(device, (torch.device, str)):
            raise InputError(f"device: expected a Device, a torch.device or a name, found {device!r}")
        name = str(device)
        kind = name.partition(":")[0]
        if kind == "cpu":
            return cls.measure(progress=progress)
        if kind == "cuda":
            return cls._of_gpu(name)
        return cls.preset(name)

    @classmethod
    def _of_gpu(cls, name: str) -> Device:
        from .presets import PRESETS

        if not torch.cuda.is_available():
            names = ", ".join(repr(preset.name) for preset in PRESETS)
            raise InputError(f"device {name!r}: there is no GPU here. Name the one that is meant: {names}.")
        found = torch.cuda.get_device_name(torch.device(name))
        for preset in PRESETS:
            if _plain(preset.name) in _plain(found):
                return preset
        raise UnsupportedError(
            f"There are no figures for {found}. Known are {', '.join(preset.name for preset in PRESETS)}; take the "
            "nearest, with its rates replaced: dataclasses.replace(Device.preset('A100'), memory=…)."
        )

    def to_json(self) -> str:
        """All numbers as JSON, for `from_json`."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Device:
        """The device that `to_json` wrote.

        >>> Device.from_json(Device.preset("A100").to_json()) == Device.preset("A100")
        True
        """
        data: dict[str, Any] = json.loads(text)
        rates = {
            name: Rate(rate["macs"], tuple(rate["half"]), rate["ragged"]) for name, rate in data.pop("products").items()
        }
        return cls(products=rates, **data)


def block_work(batch: float, queries: float, keys: float, width: float) -> tuple[float, float, float]:
    """The work of a fused attention of a CPU, in the terms that its time is made of.

    Arguments:
        batch: heads of all samples.
        queries: how many.
        keys: how many are computed.
        width: of a key and a value together.

    Returns:
        MACs; numbers of keys and values that are packed, once for every block of queries; and the MACs of blocks of
        keys that are not a whole number of vectors.
    """
    macs = batch * queries * keys * width
    blocks = math.ceil(queries / query_block(queries))
    last = keys % KEY_BLOCK
    return macs, batch * blocks * keys * width, macs * last / keys if last % _LANES and keys else 0.0


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
