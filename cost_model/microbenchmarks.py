"""What is timed to know a CPU: calls, products, attention, elementwise work, and memory near and far.

Nothing here is a model, or a layer of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..map_workspace import attention_map

Run = Callable[[], object]

_aten = torch.ops.aten
MIB = 2**20

# m, k, n of products with weights.
LINEAR = (
    (96, 256, 256), (96, 1024, 384), (384, 256, 1024), (384, 384, 1536), (384, 1536, 384), (160, 768, 640),
    (160, 640, 2560), (1536, 320, 320), (1536, 320, 1280), (768, 2048, 512),
)  # fmt: skip
# batch, m, k, n of batches of products: scores, and maps with values.
BATCHED = (
    (4, 96, 64, 96), (4, 384, 64, 384), (12, 256, 64, 256), (4, 896, 64, 896), (8, 640, 48, 640),
    (4, 96, 96, 64), (4, 384, 384, 64), (12, 256, 256, 64), (4, 896, 896, 64), (8, 640, 640, 48),
)  # fmt: skip
# Batch, heads, length, width of fused attentions: some lengths for each size of a block of queries, and some that are
# no whole number of vectors.
ATTENTION = (
    (1, 12, 96, 64), (1, 8, 160, 32), (1, 4, 160, 128), (1, 8, 151, 64), (1, 8, 320, 64), (1, 12, 256, 32),
    (1, 4, 640, 32), (1, 4, 640, 128), (1, 4, 441, 64), (1, 4, 704, 64), (1, 4, 896, 64), (1, 4, 896, 128),
    (1, 2, 1280, 64),
)  # fmt: skip
# channels in, channels out, length, kernel, stride, groups of convolutions.
CONVOLUTION = (
    (256, 512, 384, 1, 1, 1), (320, 320, 640, 1, 1, 1), (384, 384, 2000, 3, 2, 1), (1, 384, 12000, 10, 5, 1),
    (320, 320, 1200, 2, 2, 1), (640, 640, 192, 96, 1, 16), (384, 384, 384, 64, 1, 8),
)  # fmt: skip
DEPTHWISE = (
    (256, 256, 384, 31, 1, 256),
    (384, 384, 768, 15, 1, 384),
    (192, 192, 1200, 31, 1, 192),
    (320, 320, 160, 23, 1, 320),
)
# Two products of which the second has rows that do not end with a line of cache.
RAGGED = ((4, 768, 64, 1024), (4, 768, 64, 1023))
# The same with results that come from memory: columns of a result of 2 × 512 rows, in a piece.
RAGGED_FAR = (512, 511)
# What a mask costs is read off this one.
MASKED = (1, 4, 512, 64)
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
# Elements of the tensors that each kind is measured on: the caches of the cores hold them.
ELEMENTS = dict.fromkeys(
    ("gelu", "silu", "tanh", "softmax", "layer_norm", "batch_norm", "group_norm", "strided"), 192 * 1024
) | {"add": 96 * 1024}
# MiB that copies touch, from what the caches of the cores hold to what no cache does.
COPIED = (2, 3, 4, 5, 6, 8, 12, 24, 48, 96, 128, 192, 256)
# Bytes of a block that is taken from the system anew every time.
FILLED = 48 * MIB
# MiB that are gone through piece by piece before a piece is used again, by where it is then.
PLACES = {"cache": 24, "memory": 256}
# MiB of a piece, and how many of its bytes each use moves in a call.
PIECE = 2
MOVED = {"copy": 2 * PIECE * MIB, "write": PIECE * MIB, "linear": PIECE * MIB, "batched": 2 * PIECE * MIB}
# MiB of a map that is left alone between two uses.
IDLE = 8


def calls() -> dict[str, Run]:
    """Each kind of call on next to no data."""
    row, query = torch.zeros(1, 8), torch.zeros(1, 1, 4, 8)
    linear, dropout = torch.nn.Linear(8, 8).eval(), torch.nn.Dropout().eval()
    convolution = torch.nn.Conv1d(8, 8, 3).eval()
    norm, batch_norm = torch.nn.LayerNorm(8), torch.nn.BatchNorm1d(8).eval()
    signal, result = torch.zeros(1, 8, 8), torch.zeros(1, 8)
    matrix = linear.weight.detach()

    def attention() -> Tensor:
        return _aten.scaled_dot_product_attention.default(query, query, query)

    def stored() -> Tensor:
        return attention_map(query, query, None, False, 1.0)

    return {
        "view": lambda: _aten.reshape.default(row, [8]),
        "module": lambda: dropout(row),
        "norm": lambda: norm(row),
        "batch norm": lambda: batch_norm(signal),
        "element": lambda: _aten.add.Tensor(row, row),
        "linear": lambda: linear(row),
        "batched": lambda: _aten.matmul.default(query, query.transpose(-1, -2)),
        "convolution": lambda: convolution(signal),
        "attention": attention,
        "map": stored,
        "compiled element": lambda: torch.add(row, row, out=result),
        "compiled linear": lambda: torch.mm(row, matrix, out=result),
        "compiled attention": attention,
        "compiled convolution": lambda: convolution(signal),
        "compiled map": stored,
    }


def works() -> dict[str, Run]:
    """Everything else that is timed in a loop, by name."""
    return {**_copies(), **_fills(), **_products(), **_attentions(), **_elements(), **_in_dtypes()}


def _copies() -> dict[str, Run]:
    """Copies of several sizes: half of what they touch is read, half is written."""
    source, target = torch.zeros(2, COPIED[-1] * MIB // 8)
    return {
        f"copy {size}": functools.partial(target[: size * MIB // 8].copy_, source[: size * MIB // 8]) for size in COPIED
    }


def _fills() -> dict[str, Run]:
    """A block that is written again, and one that is new every time."""
    kept = torch.zeros(FILLED // 4)
    return {"fill": lambda: kept.fill_(0.0), "fill, new": lambda: torch.empty(FILLED // 4).fill_(0.0)}


def far_works() -> dict[str, Run]:
    """Each use of bytes, piece by piece: one call goes through all pieces of a place."""
    pool = torch.zeros(PLACES["memory"] // PIECE, PIECE * MIB // 4)
    rows, inputs = torch.randn(128, 512), pool.view(-1, 1024, 512)
    query, key, value = torch.randn(3, 2, 512, 64)
    maps, context = pool.view(-1, 2, 512, 512), torch.empty(2, 512, 64)
    keys = key.transpose(1, 2)

    def copy(count: int) -> None:
        for place in range(count):
            pool[place].copy_(pool[(place + count // 2) % count])

    def write(count: int) -> None:
        for place in range(count):
            pool[place].fill_(0.0)

    def linear(count: int) -> None:
        for place in range(count):
            F.linear(rows, inputs[place])

    def batched(count: int) -> None:
        for place in range(count):
            torch.bmm(query, keys, out=maps[place])
            torch.bmm(maps[(place + count // 2) % count], value, out=context)

    def scores(columns: int, count: int) -> None:
        for place in range(count):
            result = pool[place, : 2 * 512 * columns].view(2, 512, columns)
            torch.bmm(query, keys[..., :columns], out=result)

    uses: dict[str, Callable[[int], None]] = {
        "linear": linear,
        "batched": batched,
        "copy": copy,
        "write": write,
    }
    runs: dict[str, Run] = {
        f"{use}, {place}": functools.partial(run, size // PIECE)
        for use, run in uses.items()
        for place, size in PLACES.items()
    }
    for columns in RAGGED_FAR:
        runs[f"scores {columns}, memory"] = functools.partial(scores, columns, PLACES["memory"] // PIECE)
    return runs


def idle_work() -> Run:
    """A product with a map that the caches of the cores do not hold."""
    maps, value = torch.rand(IDLE, 512, 512), torch.randn(IDLE, 512, 64)
    return functools.partial(torch.bmm, maps, value, out=torch.empty(IDLE, 512, 64))


def _products() -> dict[str, Run]:
    runs: dict[str, Run] = {}
    for m, k, n in LINEAR:
        runs[f"linear {(m, k, n)}"] = functools.partial(torch.nn.Linear(k, n), torch.randn(m, k))
    for batch, m, k, n in (*BATCHED, *RAGGED):
        right = torch.randn(batch, n, k).transpose(1, 2) if k < n else torch.randn(batch, k, n)
        out = torch.empty(batch, m, n)
        runs[f"batched {(batch, m, k, n)}"] = functools.partial(torch.bmm, torch.randn(batch, m, k), right, out=out)
    for inputs, outputs, length, kernel, stride, groups in (*CONVOLUTION, *DEPTHWISE):
        padding = kernel // 2 if stride == 1 else 0
        layer = torch.nn.Conv1d(inputs, outputs, kernel, stride, padding, groups=groups)
        signal = torch.randn(1, inputs, length if padding else length + kernel - 1)
        runs[f"convolution {(inputs, outputs, length, kernel, stride, groups)}"] = functools.partial(layer, signal)
    return runs


def _attentions() -> dict[str, Run]:
    runs: dict[str, Run] = {}
    for case in ATTENTION:
        runs[f"attention {case}"] = functools.partial(F.scaled_dot_product_attention, *_heads(case))
    query, key, value = _heads(MASKED)
    mask = torch.zeros(*query.shape[:-1], key.shape[-2])
    runs["attention, no mask"] = lambda: F.scaled_dot_product_attention(query, key, value)
    runs["attention, mask"] = lambda: F.scaled_dot_product_attention(query, key, value, mask)
    return runs


def _heads(case: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, as projections give them."""
    batch, heads, length, width = case
    query, key, value = torch.randn(3, batch, length, heads, width).transpose(2, 3)
    return query, key, value


def _elements() -> dict[str, Run]:
    """Operators that are no products, on tensors that stay in the caches of the cores."""
    data, turned = torch.randn(1, 192, 1024), torch.randn(1, 1024, 192).transpose(1, 2)
    weight, norm = torch.ones(1024), torch.nn.BatchNorm1d(192).eval()
    small = torch.randn(96, 1024)
    runs: dict[str, Run] = {
        "add": lambda: torch.add(small, small),
        "gelu": lambda: F.gelu(data),
        "silu": lambda: F.silu(data),
        "tanh": lambda: torch.tanh(data),
        "softmax": lambda: torch.softmax(data, -1),
        "layer_norm": lambda: F.layer_norm(data, (1024,), weight, weight),
        "batch_norm": lambda: norm(data),
        "group_norm": lambda: F.group_norm(data, 192),
        "strided": lambda: turned.contiguous(),
    }
    return {f"element {name}": run for name, run in runs.items()}


def _in_dtypes() -> dict[str, Run]:
    """A product of middling size in every dtype."""
    left, right = torch.randn(256, 256), torch.randn(256, 384)
    return {
        f"in {name}": functools.partial(torch.matmul, left.to(dtype), right.to(dtype)) for name, dtype in DTYPES.items()
    }
