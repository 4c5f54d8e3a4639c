"""GPUs by datasheet: those of the papers, and current ones.

Peak rates and bandwidths are the vendor's, dense (without structured sparsity). Three things no datasheet says are
assumed alike for all of them, and marked here: which part of the peak a large matrix product attains, from which sizes
on, and what it takes to launch a kernel. Measurements of a GPU of yours replace them:
``dataclasses.replace(Device.preset("A100"), memory=1.4e12)``.

Sources, by figure. Float32 means what `torch.matmul` does by default, which is not TF32.

- RTX Titan: 4608 cores and 576 tensor cores at 1770 MHz, and 672 GB/s (vendor's product page): 2·4608·1.77 = 16.3 and
  2·64·576·1.77 = 130.5 TFLOP/s. 6 MB of level-2 cache (whitepaper of the Turing architecture, WP-09183-001, on TU102).
- A100 80GB SXM: 19.5 TFLOP/s in float32, and in float64 on tensor cores, 312 in half precision, 2039 GB/s (datasheet,
  nvidia-1758950-r4). 40 MB of level-2 cache (whitepaper of the Ampere architecture; the driver says 41,943,040 bytes).
- H100 SXM: 67 TFLOP/s in float32, and in float64 on tensor cores, 1979 in half precision with sparsity, half of it
  without, 3.35 TB/s (datasheet). 50 MB of level-2 cache (whitepaper of the Hopper architecture).
- H200 SXM: as the H100, with 4.8 TB/s (datasheet). The chip, and so its cache, is the H100's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .device import PRODUCTS, Device, Rate

# The part of the peak that a large product attains, and that the fused attention does.
_ATTAINED = 0.7
_ATTAINED_FUSED = 0.5
# Sizes of a product that halve its rate: tiles of 128×128 that have to fill a hundred multiprocessors.
_HALF = (256.0, 256.0, 64.0)
# Seconds to launch a kernel from Python, and from a compiled graph.
_LAUNCH, _LAUNCH_COMPILED = 6e-6, 3e-6
# How many times as fast as memory the level-2 cache is.
_CACHE = 3.0
# Plain instructions in the time of one multiply-accumulate in float32, per element.
_INSTRUCTIONS: Mapping[str, float] = {
    "add": 1, "gelu": 10, "silu": 6, "tanh": 10, "softmax": 12, "layer_norm": 8, "batch_norm": 2, "group_norm": 8,
    "strided": 4,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Datasheet:
    """Dense TFLOP/s by dtype, bytes per second, and bytes of level-2 cache."""

    name: str
    tflops: Mapping[str, float]
    memory: float
    cache: float
    source: str

    def device(self) -> Device:
        """The device that it describes."""
        single = self.tflops["float32"] * 1e12 / 2
        products = {kind: Rate(single * _ATTAINED, _HALF) for kind in PRODUCTS}
        products["attention"] = Rate(single * _ATTAINED_FUSED)
        return Device(
            name=self.name,
            kind="cuda",
            threads=1,
            products=products,
            dtypes={dtype: rate / self.tflops["float32"] for dtype, rate in self.tflops.items()},
            elements={kind: count / single for kind, count in _INSTRUCTIONS.items()},
            score=_INSTRUCTIONS["softmax"] / single,
            masked_score=_INSTRUCTIONS["add"] / single,
            memory=self.memory,
            cache=self.cache,
            cache_rate=_CACHE * self.memory,
            overhead={
                "element": _LAUNCH,
                "view": 0.0,
                "module": 0.0,
                "compiled element": _LAUNCH_COMPILED,
                "compiled view": 0.0,
                "compiled module": 0.0,
            },
            grain=0,
            asynchronous=True,
            source=f"{self.source}; {_ATTAINED:.0%} of the peak attained and {_LAUNCH * 1e6:.0f} µs a launch assumed",
        )


PRESETS: tuple[Device, ...] = tuple(
    sheet.device()
    for sheet in (
        _Datasheet(
            "RTX Titan",
            {"float32": 16.3, "float16": 130.5},
            memory=672e9,
            cache=6 * 2**20,
            source="NVIDIA Titan RTX product page (cores, clock, bandwidth); level-2 cache from the Turing whitepaper",
        ),
        _Datasheet(
            "A100",
            {"float32": 19.5, "float64": 19.5, "bfloat16": 312, "float16": 312},
            memory=2039e9,
            cache=40 * 2**20,
            source="NVIDIA A100 80GB SXM datasheet (1758950-r4); level-2 cache from the Ampere architecture whitepaper",
        ),
        _Datasheet(
            "H100",
            {"float32": 67, "float64": 67, "bfloat16": 989.5, "float16": 989.5},
            memory=3350e9,
            cache=50 * 2**20,
            source="NVIDIA H100 SXM datasheet (half of its figures with sparsity); level-2 cache from the whitepaper",
        ),
        _Datasheet(
            "H200",
            {"float32": 67, "float64": 67, "bfloat16": 989.5, "float16": 989.5},
            memory=4800e9,
            cache=50 * 2**20,
            source="NVIDIA H200 SXM datasheet (half of its figures with sparsity); level-2 cache as the H100's",
        ),
    )
)

#: A CPU like many, to decide by where this machine has not been measured.
SERVER_CPU = Device(
    name="a server CPU",
    kind="cpu",
    threads=2,
    products={
        "linear": Rate(90e9, (0, 15, 30)),
        "batched": Rate(105e9, (0, 20, 15)),
        "convolution": Rate(90e9, (0, 30, 5)),
        "depthwise": Rate(3e9),
        "attention": Rate(75e9, (20, 0, 0), 0.2),
    },
    dtypes={"float32": 1.0, "float64": 0.5, "bfloat16": 2.2, "float16": 0.03},
    elements={
        "add": 3e-11, "gelu": 2.4e-10, "silu": 2.1e-10, "tanh": 1.3e-9, "softmax": 3e-10, "layer_norm": 1.4e-10,
        "batch_norm": 1e-10, "group_norm": 1.4e-10, "strided": 4e-10,
    },
    score=1.5e-10,
    masked_score=2e-10,
    ragged=4e-11,
    ragged_memory=7e-11,
    memory=28e9,
    cache=120e6,
    cache_rate=60e9,
    own_cache=5e6,
    retention=0.02,
    outer_miss=1.2e-11,
    memory_miss={"read": 1e-11, "write": 4e-11, "linear": 3e-11, "batched": 7e-11},
    overhead={
        "view": 4e-6, "module": 5e-6, "element": 6e-6, "norm": 1e-5, "batch norm": 1.5e-5, "linear": 1e-5,
        "batched": 1.5e-5, "convolution": 2.5e-5, "attention": 1.5e-5, "map": 6e-5, "compiled element": 2e-6,
        "compiled view": 0, "compiled module": 0, "compiled linear": 3e-6, "compiled batched": 3e-6,
        "compiled convolution": 2e-5, "compiled attention": 1e-5, "compiled map": 6e-5,
    },
    fault=3e-10,
    source="Device.measure on two cores of an x86-64 server CPU with AVX-512, in round numbers",
)  # fmt: skip
