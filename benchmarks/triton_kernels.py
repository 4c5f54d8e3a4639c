"""FlexAttention's kernels for GPUs, checked without one: ``python -m benchmarks.triton_kernels``.

Needs the package ``triton`` beside a torch for CPUs. torch generates the kernels that it would for an H100, for blocks
and tiles as `fxreuse.priors.block_attention` asks for, on tensors that are on the CPU. Triton's interpreter runs them,
against the fused operator with a mask in float64; and Triton's compiler translates them, which shows how much shared
memory they take. No time is measured, and nothing runs on a GPU.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from fxreuse.priors.block_attention import _block_mask, flex_tiles, refused_by_kernel, visible_of

RESULTS = Path(__file__).parent / "results" / "triton_kernels.json"
KERNELS = Path(tempfile.gettempdir()) / "fxreuse_triton_kernels"
SOURCES = KERNELS / "sources.json"
# What the interpreter knows; it has no numbers in bfloat16, for which kernels are compiled only.
INTERPRETED = (torch.float32, torch.float16)
DTYPES = (*INTERPRETED, torch.bfloat16)
BLOCKS = {16: 8, 32: 8, 64: 5, 96: 4, 128: 4, 256: 3}  # a side, and how many of them a map has in a row
WIDTHS = (16, 32, 64, 80, 96, 128, 192, 256, 512)
CAPABILITIES = (80, 90)
_BRANCH = 'if query.get_device().type == "cpu":'


class Interpreted:
    """In place of a compiled kernel: the source that torch has generated, in Triton's interpreter."""

    last = ""

    def __init__(self, name: str, source: str) -> None:
        type(self).last = source
        self._kernel = getattr(load(source), name)

    def run(self, *args: Any, stream: Any = None) -> None:
        *operands, x, y, z = args
        if operands[0].dtype in INTERPRETED:
            self._kernel[x, y, z](*operands)


def load(source: str) -> ModuleType:
    """A generated kernel as a module, without what tunes and launches it. Triton reads the source of a file."""
    KERNELS.mkdir(exist_ok=True)
    start, body = source.index("@triton_heuristics"), source.index("@triton.jit")
    path = KERNELS / f"kernel_{abs(hash(source))}.py"
    path.write_text(source[:start] + source[body:])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pretend_to_have_a_gpu() -> None:
    """torch's compiler generates for tensors on the CPU what it does for an H100."""
    import triton
    from torch._inductor import async_compile, choices, config
    from torch._inductor import lowering as _registers_lowerings  # noqa: F401
    from torch._inductor.kernel.flex import flex_attention
    from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())
    config.cpu_backend, config.fx_graph_cache, config.compile_threads = "triton", False, 1
    source = inspect.getsource(flex_attention.flex_attention)
    assert source.count(_BRANCH) == 1
    exec(source.replace(_BRANCH, "if False:"), vars(flex_attention))
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    choices.InductorChoices.get_config_heuristics = lambda *_: CUDAConfigHeuristic()
    async_compile.AsyncCompile.triton = lambda self, name, source, device_str=None: Interpreted(name, source)


def interpret(block: int, dtype: torch.dtype, width: int, kv_heads: int, causal: bool) -> dict[str, Any]:
    """Run one attention, two samples of four heads.

    Returns the largest error, the side of the tiles (None for torch's own), and the source of the kernel.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    torch.manual_seed(0)
    rows = BLOCKS[block]
    length = rows * block
    query = torch.randn(2, 4, length, width, dtype=dtype)
    key, value = torch.randn(2, 2, kv_heads, length, width, dtype=dtype)
    blocks = torch.rand(4, rows, rows) < 0.4
    blocks |= torch.eye(rows, dtype=torch.bool)
    positions = torch.arange(length) if causal else None
    mask = _block_mask(blocks.tril() if causal else blocks, block, length, positions)

    options: Any = flex_tiles(block, (width, width), dtype.itemsize)

    def run() -> torch.Tensor:
        return flex_attention(query, key, value, None, mask, enable_gqa=kv_heads < 4, kernel_options=options)

    with torch.no_grad():
        found = torch.compile(run, dynamic=False)()
    visible = visible_of(blocks, block, length, length, positions)
    operands = [tensor.double() for tensor in (query, key, value)]
    expected = F.scaled_dot_product_attention(*operands, visible, enable_gqa=kv_heads < 4)
    error = (found.double() - expected).abs().max().item() if dtype in INTERPRETED else None
    return {"error": error, "tile": options and options["BLOCK_M"], "source": Interpreted.last}


def translate(source: str) -> dict[str, int]:
    """Compile a kernel. The bytes of shared memory that it takes, by compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def option(pattern: str) -> Any:
        found = re.search(pattern, source)
        assert found, pattern
        return ast.literal_eval(found[1])

    name, signature = option(r"'kernel_name': ('\w+')"), option(r"'signature': (\{.*?\})")
    options = {kind: option(rf"{kind}=(\d+)") for kind in ("num_warps", "num_stages")}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(signature))}
    kernel = ASTSource(getattr(load(source), name), signature, {}, aligned)
    found = {}
    for capability in CAPABILITIES:
        compiled = triton.compile(kernel, target=GPUTarget("cuda", capability, 32), options=options)
        found[str(capability)] = compiled.metadata.shared
    return found


def cases() -> list[tuple[int, torch.dtype, int, int, bool]]:
    """Blocks of every side, and heads of every width."""
    sides = [(block, dtype, 64, *rest) for block in BLOCKS for dtype in DTYPES for rest in ((4, False), (2, True))]
    widths = [(block, dtype, width, 4, True) for block in (64, 128) for dtype in DTYPES for width in WIDTHS]
    return list(dict.fromkeys([*sides, *widths]))


def interpret_all() -> None:
    """Run all kernels, and keep their sources for the compiler."""
    pretend_to_have_a_gpu()
    rows, sources = [], []
    for block, dtype, width, kv_heads, causal in cases():
        row: dict[str, Any] = {"block": block, "dtype": str(dtype).removeprefix("torch."), "width": width}
        row |= {"kv_heads": kv_heads, "causal": causal}
        refused = refused_by_kernel(torch.device("cuda"), block, (width, width), dtype)
        found = {"refused": refused} if refused else interpret(block, dtype, width, kv_heads, causal)
        sources.append(found.pop("source", None))
        rows.append(row | found)
        print(rows[-1], flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    SOURCES.write_text(json.dumps(sources))


def compile_all() -> None:
    """Add to every row what its kernel takes."""
    rows, sources = json.loads(RESULTS.read_text()), json.loads(SOURCES.read_text())
    known: dict[str, dict[str, int]] = {}
    for row, source in zip(rows, sources, strict=True):
        if source is not None:
            row["shared"] = known[source] = known.get(source) or translate(source)
            print(row, flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    """Interpret, then compile: Triton does one or the other in a process."""
    for part, interpreted in (("interpret", "1"), ("compile", "0")):
        environment = {**os.environ, "TRITON_INTERPRET": interpreted}
        subprocess.run([sys.executable, "-m", "benchmarks.triton_kernels", part], env=environment, check=True)


if __name__ == "__main__":
    {"interpret": interpret_all, "compile": compile_all}.get(sys.argv[-1], main)()
