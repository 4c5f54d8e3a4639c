"""Attention maps in storage that is kept: the right numbers, and never over a result that somebody still has."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fxreuse
from fxreuse import map_workspace
from fxreuse.map_workspace import attention_map

OPERATOR = torch.ops.fxreuse.map_in_workspace.default
BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 4, 5, 6
LARGE = 1 + int(map_workspace.SMALLEST // 4) // 512  # queries against 512 keys in float32 that make a map of the pool

Mask = Callable[[], torch.Tensor | None]


def holes() -> torch.Tensor:
    """In the first sequence one query sees nothing, in the last none does."""
    keep = torch.rand(BATCH, 1, QUERIES, KEYS) < 0.7
    keep[..., 0] = True
    keep[0, :, 1] = False
    keep[-1] = False
    return keep


def additive() -> torch.Tensor:
    return torch.randn(BATCH, HEADS, QUERIES, KEYS, dtype=torch.float64)


MASKS: dict[str, tuple[Mask, bool]] = {
    "none": (lambda: None, False),
    "causal": (lambda: None, True),
    "padding": (lambda: torch.arange(KEYS).expand(BATCH, 1, 1, KEYS) < 3, False),
    "keys alone": (lambda: torch.randn(KEYS, dtype=torch.float64), False),
    "boolean, empty rows": (holes, False),
    "additive": (additive, False),
    "additive, empty rows": (lambda: additive().masked_fill(~holes(), -torch.inf), False),
    "causal and padding": (lambda: torch.arange(KEYS).expand(BATCH, 1, 1, KEYS) < 3, True),
}


@pytest.fixture(autouse=True)
def empty_pool() -> Iterator[None]:
    fxreuse.release_workspaces()
    yield
    fxreuse.release_workspaces()


def operands(*sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys as a model has them: heads split off the channels, a transposed view."""
    batch, heads, queries, keys, width = sizes or (BATCH, HEADS, QUERIES, KEYS, WIDTH)
    made = [torch.randn(batch, length, heads, width, dtype=torch.float64).transpose(1, 2) for length in (queries, keys)]
    return made[0], made[1]


def large(rows: int = LARGE) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 1, rows, 4), torch.randn(1, 1, 512, 4)


def stored(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return attention_map(query, key, None, False, 1.0)


class Operators(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def uses_workspace(function: Callable[[], object]) -> bool:
    with Operators() as operators:
        function()
    return OPERATOR in operators.seen


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", ["batch and heads", "both in one", "one key for all"])
def test_the_map_is_that_of_fused_attention(name: str, shape: str) -> None:
    make, is_causal = MASKS[name]
    mask, (query, key) = make(), operands()
    if shape == "both in one":
        query, key = query.flatten(0, 1), key.flatten(0, 1)
        mask = None if mask is None else mask.expand(BATCH, HEADS, -1, KEYS).flatten(0, 1) if mask.dim() > 1 else mask
    elif shape == "one key for all":
        key = key[:1, :1]
    value = torch.randn(*query.shape[:-2], KEYS, 3, dtype=torch.float64)
    keep = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(0 if is_causal else KEYS)
    added = keep if mask is None else mask & keep if mask.dtype == torch.bool else mask + torch.zeros(QUERIES, 1)
    expected = F.scaled_dot_product_attention(query, key.expand(*query.shape[:-2], -1, -1), value, added, scale=0.3)
    assert uses_workspace(lambda: attention_map(query, key, mask, is_causal, 0.3))
    found = attention_map(query, key, mask, is_causal, 0.3)
    torch.testing.assert_close(found @ value, expected, rtol=1e-12, atol=1e-12)
    recorded = attention_map(query.clone().requires_grad_(), key, mask, is_causal, 0.3)
    torch.testing.assert_close(found, recorded.detach(), rtol=1e-12, atol=1e-12)
    assert ("empty" in name) == bool((found == 0).all(-1).any())


def test_unsafe_leaves_nan_where_the_mask_leaves_nothing() -> None:
    query, key = operands()
    mask = holes()
    for recorded in (False, True):
        found = attention_map(query.clone().requires_grad_(recorded), key, mask, False, 1.0, False)
        assert torch.equal(found.isnan().all(-1), (~mask).all(-1).expand(BATCH, HEADS, QUERIES))


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", ["none", "additive, empty rows", "padding"])
def test_a_map_is_stored_in_another_dtype(
    dtype: torch.dtype, near: float, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps, here of two heads: each of them has to get its own part of the mask."""
    monkeypatch.setattr(map_workspace, "_CHUNK", 2 * QUERIES * KEYS * 8)
    (make, is_causal), (query, key) = MASKS[name], operands()
    mask = make()
    found = attention_map(query, key, mask, is_causal, 0.3, True, dtype)
    assert found.dtype == dtype
    expected = attention_map(query, key, mask, is_causal, 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=near, atol=1e-7)
    recorded = attention_map(query.clone().requires_grad_(), key, mask, is_causal, 0.3, True, dtype)
    assert torch.equal(found, recorded)


@pytest.mark.parametrize("name", MASKS)
def test_gradients(name: str) -> None:
    """Of the ordinary path, which training takes, and of the operator itself."""
    make, is_causal = MASKS[name]
    mask = make()
    inputs = [tensor.requires_grad_() for tensor in operands()]
    if mask is not None and mask.is_floating_point() and torch.isfinite(mask).all():
        inputs.append(mask.requires_grad_())

    def through(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda query, key, given=mask: function(query, key, given, is_causal, 0.3, True, None)

    for function in (attention_map, OPERATOR):
        assert torch.autograd.gradcheck(through(function), inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(through(function), inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["causal and padding", "additive"])
def test_opcheck(name: str) -> None:
    make, is_causal = MASKS[name]
    query, key = (tensor.requires_grad_() for tensor in operands())
    torch.library.opcheck(OPERATOR, (query, key, make(), is_causal, 0.3, True, None))


def test_storage_is_used_again_once_nobody_has_it() -> None:
    given = large()
    first = stored(*given)
    place = first.data_ptr()
    del first
    second = stored(*given)
    assert second.data_ptr() == place
    third = stored(*given)
    assert third.data_ptr() != place


HOLDERS: dict[str, Callable[[torch.Tensor], object]] = {
    "tensor": lambda found: found,
    "view": lambda found: found[0, :, 1:2],
    "detached": lambda found: found.detach(),
    "array": lambda found: found.numpy()[0],
    "dlpack": torch.utils.dlpack.to_dlpack,
    "storage": lambda found: found.untyped_storage(),
    "parameter": lambda found: nn.Parameter(found),
    "saved for the backward pass": lambda found: torch.ones(1, requires_grad=True) * found,
}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_result_that_somebody_has_is_not_written_to(name: str) -> None:
    query, key = large()
    found = stored(query, key)
    place, expected = found.data_ptr(), found.clone()
    held = HOLDERS[name](found)
    probe = torch.frombuffer((map_workspace.ctypes.c_char * 4 * 8).from_address(place), dtype=torch.float32)
    del found
    other = stored(-query, key)
    assert other.data_ptr() != place
    assert torch.equal(probe, expected.flatten()[:8])
    del held
    again = [stored(query, key), stored(query, key)]
    assert place in [tensor.data_ptr() for tensor in again]


def test_threads_with_results_that_they_keep() -> None:
    """Eight threads, maps of four sizes, each kept for a while and looked at again before it is dropped."""
    failures: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for _ in range(15):
            rows = LARGE + 64 * int(torch.randint(4, (), generator=generator))
            query, key = torch.randn(1, rows, 2, generator=generator), torch.randn(1, 512, 2, generator=generator)
            found = stored(query, key)
            kept.append((found, torch.softmax(query @ key.transpose(-2, -1), -1)))
            if len(kept) > int(torch.randint(4, (), generator=generator)):
                for before, expected in kept:
                    if not torch.allclose(before, expected, rtol=1e-4, atol=1e-6):
                        failures.append(f"thread {seed}")
                kept = kept[2:]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(map_workspace._POOL._idle) <= 4


def test_little_is_kept_and_released_on_request() -> None:
    held = [stored(*large(LARGE + step)) for step in range(7)]
    assert fxreuse.release_workspaces() == 0
    del held
    assert len(map_workspace._POOL._idle) == 4
    stored(*large(2 * LARGE))  # has outgrown them
    assert fxreuse.release_workspaces() == 4 * 512 * 2 * LARGE
    assert fxreuse.release_workspaces() == 0
    stored(*(tensor[..., :8, :] for tensor in large()))
    assert fxreuse.release_workspaces() == 0  # small ones are not kept


def test_a_forked_process_has_a_pool_of_its_own() -> None:
    """Also where another thread of the parent was inside the pool."""
    program = f"""if True:
        import os, threading, torch
        torch.set_num_threads(1)
        from fxreuse import map_workspace
        query, key = torch.randn(1, {LARGE}, 2), torch.randn(1, 512, 2)
        expected = map_workspace.attention_map(query, key, None, False, 1.0).clone()
        held = map_workspace.attention_map(query, key, None, False, 1.0)
        inside, done = threading.Event(), threading.Event()
        def hold():
            with map_workspace._POOL._lock:
                inside.set()
                done.wait()
        thread = threading.Thread(target=hold)
        thread.start()
        inside.wait()
        child = os.fork()
        if child == 0:
            other = map_workspace.attention_map(-query, key, None, False, 1.0)
            del held
            again = map_workspace.attention_map(query, key, None, False, 1.0)
            os._exit(0 if torch.equal(again, expected) and not torch.equal(other, expected) else 3)
        done.set()
        thread.join()
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert torch.equal(held, expected)
    """
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


def test_a_result_is_pickled_and_copied_as_any_tensor() -> None:
    found = stored(*large())
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found)), found.share_memory_()):
        assert torch.equal(twin, found)


def test_training_takes_the_ordinary_path() -> None:
    query, key = operands()
    mask = torch.randn(QUERIES, KEYS, dtype=torch.float64)
    assert uses_workspace(lambda: stored(query, key))
    for index in range(3):
        given = [tensor.clone().requires_grad_(place == index) for place, tensor in enumerate((query, key, mask))]
        assert not uses_workspace(lambda given=given: attention_map(*given, False, 1.0))
        with torch.no_grad():
            assert uses_workspace(lambda given=given: attention_map(*given, False, 1.0))


def test_forward_mode_and_vmap() -> None:
    query, key = operands()
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        tangent = forward_ad.unpack_dual(stored(dual, key)).tangent
    _, expected = torch.func.jvp(lambda given: torch.softmax(given @ key.mT, -1), (query,), (torch.ones_like(query),))
    torch.testing.assert_close(tangent, expected)
    for in_dims in [(0, None, None), (2, 0, 1), (None, 1, None), (None, None, 0)]:
        sizes = [(HEADS, QUERIES, WIDTH), (HEADS, KEYS, WIDTH), (KEYS,)]
        given = [
            torch.randn(size if dim is None else (*size[:dim], 7, *size[dim:]), dtype=torch.float64)
            for size, dim in zip(sizes, in_dims, strict=True)
        ]
        found = torch.vmap(lambda *given: attention_map(*given, True, 0.5), in_dims)(*given)
        slices = [
            [tensor if dim is None else tensor.select(dim, index) for tensor, dim in zip(given, in_dims, strict=True)]
            for index in range(7)
        ]
        torch.testing.assert_close(found, torch.stack([attention_map(*one, True, 0.5) for one in slices]))


def test_autocast_and_mixed_dtypes_have_the_dtype_of_ordinary_code() -> None:
    query, key = (tensor.float() for tensor in operands())
    with torch.autocast("cpu", torch.bfloat16):
        assert not uses_workspace(lambda: stored(query, key))
        assert stored(query, key).dtype == torch.softmax(query @ key.mT, -1).dtype
    half = [tensor.bfloat16() for tensor in (query, key)]
    assert stored(*half).dtype == torch.bfloat16
    assert attention_map(*half, torch.zeros(KEYS), False, 1.0).dtype == torch.float32


class Attention(nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attention_map(query, key, mask, False, 0.5) @ key


def test_compiled_whole_with_one_graph_for_all_sizes() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Attention(), backend=counter, fullgraph=True, dynamic=True)
    model = Attention()
    for rows in (5, 6, LARGE, LARGE + 7):
        query, key, mask = torch.randn(2, 1, rows, 4), torch.randn(2, 1, 512, 4), torch.rand(2, 1, 1, 512) < 0.5
        torch.testing.assert_close(compiled(query, key, mask), model(query, key, mask))
    assert counter.frame_count == 1
    assert [node for node in counter.graphs[0].graph.nodes if "map_in_workspace" in str(node.target)]
    key.requires_grad_()
    compiled(query, key, mask).sum().backward()
    found, key.grad = key.grad, None
    model(query, key, mask).sum().backward()
    torch.testing.assert_close(found, key.grad)


def test_exported_as_ordinary_operators() -> None:
    given = (*(tensor.float() for tensor in operands()), torch.ones(KEYS, dtype=torch.bool))
    for strict in (False, True):
        with torch.no_grad():
            program = torch.export.export(Attention(), given, strict=strict)
        assert not [node for node in program.graph.nodes if "fxreuse" in str(node.target)]
        torch.testing.assert_close(program.module()(*given), Attention()(*given))
