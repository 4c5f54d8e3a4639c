"""The latency model: its parts against cases worked out by hand, and the whole against what has to hold of it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import fxreuse
from fxreuse.cost_model import heap
from fxreuse.cost_model.attention_time import SharedMap
from fxreuse.cost_model.device import Device, Rate
from fxreuse.cost_model.fit import fit_times
from fxreuse.cost_model.fusion import fuse
from fxreuse.cost_model.kernels import Kernel, kernels_of
from fxreuse.cost_model.latency import Prediction, predict, predict_latency
from fxreuse.cost_model.operations import operations
from fxreuse.cost_model.presets import PRESETS, SERVER_CPU
from fxreuse.cost_model.residency import Caches, Residency
from fxreuse.cost_model.summary import Summary, summarise
from fxreuse.emission.rewritten import Rewritten
from fxreuse.frontend.load import load_program
from fxreuse.passes.fold_modules import fold_modules

MIB = 2**20
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


class Block(nn.Module):
    """Convolution, attention with fused or stored maps, and a feed-forward layer."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.query, self.key, self.value, self.output = (nn.Linear(32, 32) for _ in range(4))
        self.convolution = nn.Conv1d(32, 32, 3, padding=1, groups=32)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.convolution(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = (p(x).unflatten(-1, (2, 16)).transpose(1, 2) for p in (self.query, self.key, self.value))
        if self.fused:
            context = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            context = torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v
        x = x + self.output(context.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def blocks(fused: bool, layers: int = 4) -> nn.Module:
    return nn.Sequential(*(Block(fused) for _ in range(layers))).eval()


@pytest.fixture(scope="module")
def summaries() -> dict[str, Summary]:
    """A model with fused and one with unfused attention, and the first one rewritten in both lowerings."""
    example = torch.randn(2, 7, 32)
    fused = blocks(True)
    found = {
        "fused": summarise(load_program(fused, example)),
        "unfused": summarise(load_program(blocks(False), example)),
    }
    for lowering in ("materialize", "recompute"):
        small = fxreuse.apply(fused, f"2x2 lowering={lowering}", example)
        assert isinstance(small, Rewritten)
        found[lowering] = summarise(small.program)
    return found


def predicted(summary: Summary, device: Device = SERVER_CPU, compiled: bool = False, **sizes: int) -> Prediction:
    return predict_latency(summary, device, sizes or {"B": 2, "T": 64}, compiled=compiled)


# Devices


@pytest.mark.parametrize("device", [*PRESETS, SERVER_CPU], ids=lambda device: device.name)
def test_a_device_is_kept_as_json(device: Device) -> None:
    assert Device.from_json(device.to_json()) == device
    assert device.source


def test_presets_have_the_figures_of_their_datasheets() -> None:
    figures = {d.name: (d.memory / 1e9, d.dtypes.get("bfloat16"), d.cache / MIB) for d in PRESETS}
    assert figures == {
        "RTX Titan": (672, None, 6),
        "A100": (2039, 312 / 19.5, 40),
        "H100": (3350, 989.5 / 67, 50),
        "H200": (4800, 989.5 / 67, 50),
    }


@pytest.mark.parametrize("name", ["H100", "h100", "rtx titan", "RTX-Titan"])
def test_a_preset_is_found_by_its_name(name: str) -> None:
    assert Device.of(name) in PRESETS


@pytest.mark.parametrize("name", ["V100", "", "gpu"])
def test_an_unknown_device_is_an_error_that_lists_those_there_are(name: str) -> None:
    with pytest.raises(fxreuse.InputError, match=r"no device .*'RTX Titan', 'A100', 'H100', 'H200', and 'cpu'"):
        Device.of(name)


def test_what_is_no_device_is_an_error() -> None:
    with pytest.raises(fxreuse.InputError, match=r"expected a Device, .* found 3"):
        Device.of(3)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_an_error() -> None:
    with pytest.raises(fxreuse.InputError, match="there is no GPU here"):
        Device.of(torch.device("cuda"))


def test_a_dtype_that_a_device_lacks_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16)
    summary = summarise(load_program(model, torch.randn(2, 8, dtype=torch.bfloat16)))
    with pytest.raises(fxreuse.InputError, match=r"'RTX Titan' has no rate for matrix products in bfloat16.*float16"):
        predict_latency(summary, "RTX Titan")
    assert predict_latency(summary, "A100").seconds > 0


def test_a_rate_is_halved_at_its_half_sizes() -> None:
    rate = Rate(1e9, (10, 20, 40))
    assert rate.seconds(1, math.inf, math.inf, 40) != rate.seconds(1, 1e12, 1e12, 40)
    assert rate.seconds(2, 10, 1e9, 1e9) == pytest.approx(2 * 2 * 10 * 1e18 / 1e9)
    assert rate.seconds(1, 10, 20, 40) == pytest.approx(4 * 8000 / 1e9)
    assert rate.seconds(1, 0, 20, 40) == 0


# Fits


def test_a_fit_finds_the_terms_that_times_are_made_of() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = (torch.rand(12, 4, generator=generator, dtype=torch.float64) + 0.1).tolist()
    wanted = [3e-9, 0.0, 2e-7, 0.0]
    times = [sum(c * t for c, t in zip(wanted, row, strict=True)) for row in terms]
    assert fit_times(terms, times) == pytest.approx(wanted, abs=1e-12)
    known = [row[0] * 3e-9 for row in terms]
    assert fit_times([row[1:] for row in terms], times, known) == pytest.approx(wanted[1:], abs=1e-12)


def test_a_fit_has_no_negative_coefficients() -> None:
    terms = [(1.0, n, n * n) for n in (1.0, 2.0, 3.0, 4.0)]
    found = fit_times(terms, [10 - n for n in (1.0, 2.0, 3.0, 4.0)])
    assert min(found) >= 0
    assert found[0] > 0
    assert fit_times([(1.0,)], [1.0], [2.0]) == [0.0]


# The heap


def test_a_block_that_was_freed_is_lent_again_and_is_not_new() -> None:
    memory = heap.Heap()
    first, second = memory.take(MIB), memory.take(MIB)
    assert first.new > 0
    assert second.new > 0
    memory.give(first)
    again = memory.take(MIB - 4096)
    assert (again.start, again.new) == (first.start, 0)


def test_neighbours_that_are_free_are_one_block() -> None:
    memory = heap.Heap()
    blocks = [memory.take(MIB) for _ in range(4)]
    for place in (0, 2, 1):
        memory.give(blocks[place])
    assert memory.take(3 * MIB).start == blocks[0].start


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    memory = heap.Heap()
    large, _, small, _ = (memory.take(size * MIB) for size in (4, 1, 2, 1))
    memory.give(large)
    memory.give(small)
    assert memory.take(2 * MIB).start == small.start


@pytest.mark.parametrize(("size", "anew"), [(31, False), (33, True)])
def test_blocks_above_the_limit_are_new_every_time(size: int, anew: bool) -> None:
    memory = heap.Heap()
    memory.give(memory.take(size * MIB))
    assert (memory.take(size * MIB).new > 0) == anew


@pytest.mark.parametrize(("count", "anew"), [(2, False), (3, True)])
def test_a_top_that_has_grown_beyond_its_limit_goes_back_to_the_system(count: int, anew: bool) -> None:
    memory = heap.Heap()
    for block in [memory.take(24 * MIB) for _ in range(count)]:
        memory.give(block)
    assert (memory.take(24 * MIB).new > 20 * MIB) == anew


# The cache

SOME = object.__new__(fxreuse.cost_model.Operation)  # of which nothing is read


def kernel(reads: dict[int, int], writes: dict[int, int], **rest: object) -> Kernel:
    return Kernel(SOME, "add", reads=tuple(reads.items()), writes=tuple(writes.items()), **rest)  # type: ignore[arg-type]


def memory_traffic(kernels: list[Kernel], cache: int, lasting: set[int] = frozenset()) -> list[float]:  # type: ignore[assignment]
    return [moved.memory for moved in Residency(Caches(0, cache), heap=False).run(kernels, lasting)]


def test_what_fits_into_cache_stays_there() -> None:
    chain = [kernel({1: 10}, {2: 10}), kernel({2: 10}, {3: 10})]
    assert memory_traffic(chain, 100, {1}) == [0, 0]


def test_what_does_not_fit_into_cache_comes_from_memory() -> None:
    """A map of 60 bytes, that is written, read by a softmax in place, and read by a product."""
    chain = [kernel({1: 5}, {2: 60}, kept=True), kernel({2: 60}, {2: 60}), kernel({2: 60, 3: 5}, {4: 5})]
    assert sum(memory_traffic(chain, 400, {1, 3})) == 0
    assert (
        memory_traffic(chain, 60, {1, 3})[1] == 30
    )  # half of a map as large as the cache; what is written back as well
    assert memory_traffic(chain, 40, {1, 3})[1] == 60
    assert sum(memory_traffic(chain, 0, {1, 3})) == 5 + 3 * 60 + 10


def test_weights_that_do_not_fit_together_are_read_from_memory_at_every_call() -> None:
    chain = [kernel({weight: 30}, {9: 1}) for weight in range(4)]
    assert sum(memory_traffic(chain, 400, set(range(4)))) == 0
    assert sum(memory_traffic(chain, 60, set(range(4)))) >= 120


def test_bytes_that_are_touched_again_and_again_push_others_out_once() -> None:
    chain = [kernel({1: 10}, {}), *(kernel({2: 30}, {}) for _ in range(9))]
    assert memory_traffic(chain, 100, {1, 2})[0] == 0


def test_others_push_out_of_a_shared_cache_what_is_left_alone_for_long() -> None:
    chain = [kernel({1: 10}, {}), kernel({2: 10}, {})]
    for retention, expected in ((math.inf, 0), (2.0, 5), (1.0, 10)):
        shared = Residency(Caches(0, 1e9, retention), heap=False)
        found = shared.run(chain, {1, 2}, lambda kernel, moved: 1.0)
        assert [moved.memory for moved in found] == pytest.approx([expected] * 2)


def test_a_core_keeps_its_own_cache_whatever_others_do() -> None:
    found = Residency(Caches(1e3, 1e9, retention=1.0), heap=False).run([kernel({1: 10}, {})], {1}, lambda *_: 9.0)
    assert [(moved.outer, moved.memory) for moved in found] == [(0, 0)]


def test_a_result_in_the_place_of_a_dead_one_is_in_cache() -> None:
    """Of two results in new memory the third takes the place of the first."""
    size = MIB
    chain = [kernel({}, {1: size}), kernel({1: size}, {2: size}), kernel({2: size}, {3: size}), kernel({3: size}, {})]
    near = Residency(Caches(0, 64 * MIB), heap=True).run(chain, ())
    assert [(moved.memory, moved.faulted) for moved in near] == [(0, 0)] * 4
    far = Residency(Caches(0, MIB), heap=True).run(chain, ())
    assert far[2].memory > 1.5 * size
    assert far[2].written > 0.9 * size


def test_pages_are_new_where_the_heap_says_so_and_never_in_a_workspace() -> None:
    size = 40 * MIB
    for kept, faulted in ((False, True), (True, False)):
        chain = [kernel({}, {1: size}, kept=kept), kernel({1: size}, {2: 8})]
        found = Residency(Caches(0, 1e6), heap=True).run(chain, ())
        assert (found[0].faulted > 0) == faulted


# Kernels and fusion


@pytest.mark.parametrize("name", ["fused", "unfused", "materialize", "recompute"])
@pytest.mark.parametrize("eager_cpu", [True, False])
def test_the_products_of_kernels_are_the_multiply_accumulates(
    summaries: dict[str, Summary], name: str, eager_cpu: bool
) -> None:
    values = summaries[name].values(B=3, T=50)

    def at(size: object) -> int:
        return int(size.xreplace(values))  # type: ignore[attr-defined]

    for operation in summaries[name].operations:
        products = [made.product for made in kernels_of(operation, at, eager_cpu) if made.product]
        assert sum(map(math.prod, products)) == at(operation.macs), operation


def test_a_convolution_is_parted_by_its_groups(summaries: dict[str, Summary]) -> None:
    values = summaries["fused"].values(B=3, T=50)
    (one, *_) = [operation for operation in summaries["fused"].operations if operation.kind == "convolution"]
    *before, made = kernels_of(one, lambda size: int(size.xreplace(values)))
    assert (made.family, made.product) == ("depthwise", (32, 150, 1, 3))
    assert [copied.family for copied in before] == ["strided"]  # the transposed input is copied first
    assert [size for _, size in made.writes] == [3 * 50 * 32 * 4] * 3  # and again in blocks, as is the result


def test_the_weight_of_a_convolution_is_told_from_its_bias() -> None:
    """A module from which a parametrisation was removed has its bias before its weight."""
    convolution = nn.Conv1d(4, 6, 3)
    weight = convolution.weight
    del convolution.weight
    convolution.weight = weight
    program = fold_modules(load_program(nn.Sequential(convolution).eval(), torch.randn(2, 4, 9)))
    (one,) = (operation for operation in operations(program) if operation.kind == "convolution")
    assert one.step.leaf is not None
    (made,) = kernels_of(one, lambda size: int(size.xreplace(dict.fromkeys(size.free_symbols, 9))))
    assert made.product is not None
    assert made.product[::3] == (1, 12)


def test_a_causal_attention_leaves_out_whole_blocks() -> None:
    class Causal(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.unflatten(-1, (2, 16)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    summary = summarise(load_program(Causal(), torch.randn(2, 9, 32)))
    (operation,) = (one for one in summary.operations if one.kind == "attention")
    (length,) = operation.shapes[-1][2].free_symbols

    def keys(size: int) -> int:
        at = dict.fromkeys(operation.macs.free_symbols, 2) | {length: size}
        (made,) = kernels_of(operation, lambda expression: int(expression.xreplace(at)))
        assert made.product is not None
        return made.product[2]

    assert (keys(512), keys(2048)) == (512, 1280)


def test_fusion_leaves_out_what_stays_in_registers() -> None:
    view, add = Kernel(SOME, "view", dispatch="view"), kernel({1: 8}, {2: 8}, fusible=True, dispatch="element")
    second = kernel({2: 8, 5: 8}, {3: 8}, fusible=True, dispatch="element")
    product = Kernel(SOME, "linear", product=(1, 1, 1, 1), reads=((3, 8), (4, 8)), writes=((6, 8),), dispatch="linear")
    made = fuse([add, view, second, product])
    assert [(one.reads, one.writes, one.dispatch) for one in made] == [
        (((1, 8),), (), "element"),
        ((), (), "view"),
        (((5, 8),), ((3, 8),), ""),
        (((3, 8), (4, 8)), ((6, 8),), "linear"),
    ]


def test_a_value_that_is_read_after_a_product_is_written() -> None:
    add = kernel({1: 8}, {2: 8}, fusible=True, dispatch="element")
    product = Kernel(SOME, "linear", product=(1, 1, 1, 1), reads=((2, 8),), writes=((3, 8),), dispatch="linear")
    late = kernel({2: 8, 3: 8}, {4: 8}, fusible=True, dispatch="element")
    assert [one.writes for one in fuse([add, product, late])] == [((2, 8),), ((3, 8),), ()]


# Predictions


def test_a_product_takes_what_its_rate_says_and_the_call() -> None:
    device = dataclasses.replace(SERVER_CPU, memory_miss={}, fault=0.0)
    summary = summarise(load_program(nn.Sequential(nn.Linear(64, 128)), torch.randn(4, 64)))
    found = predict_latency(summary, device, {"B": 100})
    wanted = device.products["linear"].seconds(1, 100, 128, 64) + device.overhead["linear"]
    assert found.seconds == pytest.approx(wanted)
    far = dataclasses.replace(device, memory_miss={"linear": 1e-6}, own_cache=0.0, cache=0.0)
    moved = 4 * (100 * 64 + 64 * 128 + 128 + 100 * 128)
    assert predict_latency(summary, far, {"B": 100}).seconds == pytest.approx(wanted + 1e-6 * moved)


def test_rows_that_share_lines_of_cache_take_longer_where_they_are_far() -> None:
    times = []
    for columns in (128, 127):
        summary = summarise(load_program(nn.Sequential(nn.Linear(64, columns)), torch.randn(4, 64)))
        near = predict_latency(summary, SERVER_CPU, {"B": 100}).seconds
        far = dataclasses.replace(SERVER_CPU, own_cache=0.0, cache=0.0, ragged_memory=1e-6, memory_miss={})
        times.append(predict_latency(summary, far, {"B": 100}).seconds - near)
    assert times[0] == pytest.approx(0, abs=1e-9)
    assert times[1] == pytest.approx((SERVER_CPU.ragged + 1e-6) * 100 * 127)


def test_fused_attention_packs_keys_for_every_block_of_queries() -> None:
    device = dataclasses.replace(SERVER_CPU, products={**SERVER_CPU.products, "attention": Rate(1e9, (16, 0, 0), 0.5)})

    def seconds(queries: int, keys: int) -> float:
        return device.product("attention", 4, queries, keys, 128, torch.float32)

    assert seconds(512, 512) == pytest.approx(4 * 512 * 512 * 128 * (1 + 16 / 64) / 1e9)
    assert seconds(1024, 512) == pytest.approx(4 * 1024 * 512 * 128 * (1 + 16 / 256) / 1e9)
    assert seconds(65, 512) == pytest.approx(4 * 512 * 128 * (65 + 3 * 16) / 1e9)
    assert seconds(512, 511) == pytest.approx(4 * 512 * 511 * 128 * (1 + 16 / 64 + 0.5) / 1e9)
    assert seconds(512, 0) == 0


def test_parts_add_up_to_the_whole(summaries: dict[str, Summary]) -> None:
    found = predicted(summaries["materialize"])
    for parts in (found.by_kind, found.by_module, found.by(lambda operation: operation.part)):
        assert sum(parts.values()) == pytest.approx(found.seconds)
    assert list(found.by_kind.values()) == sorted(found.by_kind.values(), reverse=True)
    assert len(found.operations) == len(summaries["materialize"].operations)
    assert {"map", "linear", "product"} <= found.by_kind.keys()


def test_a_prediction_is_printed_as_a_table(summaries: dict[str, Summary]) -> None:
    text = str(predicted(summaries["fused"], B=1, T=100))
    assert "ms predicted on a server CPU, eager, B = 1, T = 100" in text.splitlines()[0]
    assert "attention" in text


@pytest.mark.parametrize("device", [*PRESETS, SERVER_CPU], ids=lambda device: device.name)
@pytest.mark.parametrize("compiled", [False, True])
def test_reuse_pays_and_more_so_the_longer_the_input(
    summaries: dict[str, Summary], device: Device, compiled: bool
) -> None:
    gains = []
    for length in (512, 4096):
        times = {
            name: predicted(summary, device, compiled, B=1, T=length).seconds for name, summary in summaries.items()
        }
        assert min(times["materialize"], times["recompute"]) <= 1.01 * times["fused"]
        gains.append(times["unfused"] / min(times["materialize"], times["recompute"]))
    assert gains == sorted(gains)


def test_compiled_is_never_slower(summaries: dict[str, Summary]) -> None:
    for summary in summaries.values():
        for length in (16, 512):
            one = predicted(summary, compiled=True, B=1, T=length).seconds
            assert one < predicted(summary, B=1, T=length).seconds


def test_large_maps_take_new_pages_only_where_they_are_not_kept(summaries: dict[str, Summary]) -> None:
    """What a page costs counts for the maps of an unfused model, and not for those in a workspace."""
    slow = dataclasses.replace(SERVER_CPU, fault=1e-6)
    sizes = {"B": 1, "T": 2100}  # 35 MB a map
    extra = {name: predicted(s, slow, **sizes).seconds - predicted(s, **sizes).seconds for name, s in summaries.items()}
    assert extra["unfused"] > 8 * 35
    assert extra["materialize"] < 4
    assert extra["fused"] < 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"B": 1}, "The size T is missing"),
        ({"B": 1, "T": 9, "N": 1}, "no size 'N'"),
        ({"B": 1, "T": -1}, "whole number"),
    ],
)
def test_sizes_that_are_missing_or_unknown_are_errors(
    summaries: dict[str, Summary], sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(fxreuse.InputError, match=message):
        predict_latency(summaries["fused"], SERVER_CPU, sizes)


def test_a_symbol_without_a_value_is_an_error(summaries: dict[str, Summary]) -> None:
    with pytest.raises(fxreuse.InputError, match="The size B has no value"):
        predict(summaries["fused"].operations, {}, SERVER_CPU)


# Against the measured kernels


@pytest.mark.parametrize("length", [512, 1024, 2048, 4096])
def test_a_shared_map_takes_the_part_of_fused_attention_that_was_measured(length: int) -> None:
    """Kernels of `benchmarks/reuse_latency.py`: 4 heads of width 64; a leader and a follower against two fused ones."""
    row = json.loads((RESULTS / "reuse_kernels.json").read_text())[str(length)]
    one = SharedMap(4, length, length, 64, 64, layers=2)
    measured = (row["leader"] + row["follower"]) / (2 * row["fused"])
    assert one.stored(SERVER_CPU) / one.computed_again(SERVER_CPU) == pytest.approx(measured, rel=0.3)
    assert 1e3 * one.computed_again(SERVER_CPU) == pytest.approx(2 * row["fused"], rel=0.35)
