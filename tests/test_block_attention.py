"""Attention over blocks: what FlexAttention's kernel is told, and on a GPU that it computes what the mask does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fxreuse
from fxreuse.priors.block_attention import (
    flex_attention_over_blocks,
    flex_tiles,
    refused_by_kernel,
    visible_of,
)

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


SIDES = st.sampled_from([16, 24, 64, 80, 96, 128, 192, 256, 512])


@given(st.integers(1, 64), SIDES, SIDES, st.sampled_from([2, 4]))
def test_tiles_divide_their_blocks_and_fit(sixteenths, width, value_width, itemsize):
    block = 16 * sixteenths
    options = flex_tiles(block, (width, value_width), itemsize)
    if options is None:
        assert block % 128 == 0
        return
    assert options["BLOCK_M"] == options["BLOCK_N"] == (side := options["BLOCK_M"])
    assert block % side == 0
    assert side >= 16
    assert side & (side - 1) == 0
    assert side == 16 or side * (3 * width + 2 * value_width + side) * itemsize <= 96 * 1024


def test_tiles_are_as_large_as_shared_memory_lets_them_be():
    sides = {}
    for width, itemsize in ((64, 4), (80, 4), (128, 4), (256, 4), (128, 2), (192, 2)):
        sides[width, itemsize] = flex_tiles(64, (width, width), itemsize)["BLOCK_M"]
    assert sides == {(64, 4): 64, (80, 4): 32, (128, 4): 32, (256, 4): 16, (128, 2): 64, (192, 2): 32}


def test_what_an_accelerator_refuses():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert "multiple of 16 on cuda, not of 24" in refused_by_kernel(gpu, 24, (64, 64), torch.float32)
    assert "16 channels on cuda, not of 8" in refused_by_kernel(gpu, 32, (64, 8), torch.float32)
    assert "bfloat16 on cuda, not float64" in refused_by_kernel(gpu, 32, (64, 64), torch.float64)
    assert "not 512 channels of 4 bytes" in refused_by_kernel(gpu, 32, (512, 512), torch.float32)
    assert refused_by_kernel(gpu, 32, (512, 512), torch.float16) is None
    assert refused_by_kernel(gpu, 32, (64, 16), torch.float32) is None
    assert refused_by_kernel(cpu, 3, (8, 8), torch.float64) is None


def operands(block, rows, heads, kv_heads, dtype, causal, device, width):
    torch.manual_seed(0)
    length = rows * block
    query = torch.randn(2, heads, length, width, dtype=dtype, device=device)
    key, value = torch.randn(2, 2, kv_heads, length, width, dtype=dtype, device=device)
    blocks = torch.rand(heads, rows, rows, device=device) < 0.4
    blocks |= torch.eye(rows, dtype=torch.bool, device=device)
    positions = torch.arange(length, device=device) if causal else None
    if causal:
        blocks = blocks.tril()
    return query, key, value, blocks, positions


def check(block, rows, dtype, kv_heads, causal, device, run=flex_attention_over_blocks, width=64):
    query, key, value, blocks, positions = operands(block, rows, 4, kv_heads, dtype, causal, device, width)
    grouped, pairs = kv_heads < 4, int(blocks.sum()) * block**2
    length = rows * block
    visible = visible_of(blocks, block, length, length, positions)
    wide = [tensor.double() for tensor in (query, key, value)]
    expected = F.scaled_dot_product_attention(*wide, visible, enable_gqa=grouped)
    with torch.no_grad():
        found = run(query, key, value, None, 0.0, None, grouped, pairs, blocks, block, positions)
    tolerance = {torch.float32: 5e-3, torch.bfloat16: 2e-2, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("block", "rows", "kv_heads"), [(24, 6, 4), (24, 6, 2), (64, 5, 4)])
def test_flex_attention_on_a_cpu_is_the_mask(block, rows, kv_heads, causal):
    check(block, rows, torch.float32, kv_heads, causal, "cpu")


@pytest.mark.parametrize("causal", [False, True])
def test_without_a_compiler_it_is_the_mask(causal):
    """Where torch does not compile what it was asked to, or compiles nothing into a kernel, no block is forgotten."""
    with torch.compiler.set_stance("force_eager"):
        check(16, 4, torch.float32, 4, causal, "cpu")
    traced = torch.compile(flex_attention_over_blocks, backend="aot_eager", dynamic=False)
    check(16, 4, torch.float32, 4, causal, "cpu", traced)


@gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("block", "rows"), [(16, 8), (24, 6), (32, 8), (64, 5), (96, 4), (128, 4), (256, 3)])
def test_flex_attention_on_a_gpu_is_the_mask(block, rows, dtype, kv_heads, causal):
    check(block, rows, dtype, kv_heads, causal, "cuda")


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [8, 32, 80, 96, 128, 192, 256, 512])
@pytest.mark.parametrize("block", [64, 128])
def test_heads_of_any_width_on_a_gpu(block, width, dtype):
    check(block, 3, dtype, 4, True, "cuda", width=width)


@gpu
@pytest.mark.parametrize("block", [16, 64, 128])
def test_a_model_pruned_in_blocks_runs_on_a_gpu(block):
    """Chosen by itself there, trained as the mask, and compiled without a break."""
    layer = torch.nn.TransformerEncoderLayer(128, 2, 256, batch_first=True, dropout=0.0)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).cuda().eval()
    x = torch.randn(2, 4 * block, 128, device="cuda")
    weighed = fxreuse.apply(model, f"fiak block={block}", x)
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for name, parameter in weighed.named_parameters():
            if name not in dict(model.named_parameters()):
                parameter.mul_(torch.rand(parameter.shape, generator=generator, device="cuda"))
    pruned = fxreuse.prune(weighed, scores=0.5)
    masked = fxreuse.prune(weighed, scores=0.5, lowering="mask")
    assert {site.lowering for site in fxreuse.describe(pruned).pruned} == {"flex"}
    with torch.no_grad():
        expected = masked(x)
        torch.testing.assert_close(pruned(x), expected, rtol=1e-2, atol=1e-2)
        compiled = torch.compile(pruned, fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(pruned(x), masked(x), rtol=1e-3, atol=1e-3)
    pruned(x).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())
