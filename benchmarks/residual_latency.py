"""Shared weights with residuals on a CPU: both lowerings and the automatic one against the dense model.

    python benchmarks/residual_latency.py                  # everything that benchmarks/results/ does not have yet
    python benchmarks/residual_latency.py tokens 512       # 18 layers, K = 3, R = 16, at one length
    python benchmarks/residual_latency.py single           # one token: L = 18 and 36, K = 3, 6 and 9, and bytes read
    python benchmarks/residual_latency.py --prepare        # captures and compiles only; the timings then start sooner
    python benchmarks/residual_latency.py --tiny           # a model of width 32, to see that everything runs
    python benchmarks/tables.py                            # writes the tables in docs/

Every cell is one interleaved run without gradients, eager and compiled, d = 512, f = 2048, 8 heads, batch 1, float32,
two threads; rounds in which anything else ran are dropped, and each model is called once, not timed, before its calls
of a round. Compiled models are compared with the compiled dense one. Weights are random, and residuals start at zero:
neither changes what is computed.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxreuse
from fxreuse.apply import rewrite
from fxreuse.attention import AttentionSites
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program
from fxreuse.program import Program

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT)]

from reuse_latency import PlainLayer, load, save  # noqa: E402
from undisturbed import undisturbed  # noqa: E402

PREPARED = Path(tempfile.gettempdir()) / "fxreuse_residual_latency"
LENGTHS = (1, 256, 512, 1024)
DEPTHS = (18, 36)
GROUPS = (3, 6, 9)


def dense(layers: int, tiny: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(PlainLayer(32 if tiny else 512, 8) for _ in range(layers))).eval()


def frames(length: int, tiny: bool) -> tuple[torch.Tensor]:
    return (torch.randn(1, length, 32 if tiny else 512),)


@functools.cache
def captured(layers: int, length: int, tiny: bool) -> tuple[nn.Module, Program, AttentionSites]:
    """The dense model, its program at a length, and its attentions: one capture for all plans."""
    model = dense(layers, tiny)
    program = load_program(model, frames(length, tiny))
    return model, program, find(program)


def prepared(plan: str, layers: int, length: int, tiny: bool) -> nn.Module:
    """The dense model under a plan, captured at a length; kept in a file."""
    PREPARED.mkdir(exist_ok=True)
    name = f"{plan} {layers} {length}{' tiny' if tiny else ''}".replace(" ", "_")
    path = PREPARED / f"{name}.pt"
    if not path.exists():
        model, program, sites = captured(layers, length, tiny)
        torch.save(rewrite(program, sites, fxreuse.Plan.parse(plan), model), path)
    return torch.load(path, weights_only=False)


def variants(layers: int, k: int, length: int, tiny: bool) -> dict[str, nn.Module]:
    plan = f"residual k={k} r=16 init=zero lowering="
    models: dict[str, nn.Module] = {"dense": dense(layers, tiny)}
    models["auto"] = prepared(f"{plan}auto", layers, length, tiny)
    # At other lengths than that of the capture, both compute the same: one capture serves all.
    if length > 1:
        models["factored"] = prepared(f"{plan}factored", layers, 8, tiny)
        models["merged"] = prepared(f"{plan}merged", layers, 8, tiny)
    else:
        models["shared"] = prepared(f"share k={k}", layers, 8, tiny)
    return models


def functions(models: dict[str, nn.Module], inputs: tuple[torch.Tensor]) -> dict[str, Callable[[], object]]:
    """What is timed: every model eagerly, and compiled but for the lowerings that `auto` chooses from."""
    torch.compiler.reset()
    run: dict[str, Callable[[], object]] = {name: functools.partial(model, *inputs) for name, model in models.items()}
    for name in ("dense", "auto", "shared"):
        if name in models:
            run[f"{name}, compiled"] = functools.partial(torch.compile(models[name], dynamic=False), *inputs)
            run[f"{name}, compiled"]()
    return run


def chosen(model: nn.Module) -> str:
    """What the automatic lowering took, by the shapes of matrices."""
    found = {"×".join(map(str, one.shape)): one.lowering for one in fxreuse.describe(model).matrices}
    return "; ".join(f"{shape} {lowering}" for shape, lowering in found.items())


def memory_of(model: nn.Module) -> int:
    """The bytes of all parameters, each once: what has to come from memory where a group's weights stay in cache."""
    return sum(parameter.nbytes for parameter in model.parameters())


def measure(layers: int, k: int, length: int, seconds: float, tiny: bool) -> dict[str, Any]:
    models = variants(layers, k, length, tiny)
    timings, dropped = undisturbed(functions(models, frames(length, tiny)), seconds=seconds, settled=True)
    gains = {
        name: timing.speedup_over(timings["dense, compiled" if name.endswith("compiled") else "dense"])
        for name, timing in timings.items()
        if not name.startswith("dense")
    }
    return {
        "layers": layers,
        "k": k,
        "length": length,
        "auto": chosen(models["auto"]),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": len(timings["dense"].rounds),
        "dropped": dropped,
        "ms": {name: 1e3 * timing.seconds.median for name, timing in timings.items()},
        "over dense": {name: [gain.median, gain.low, gain.high] for name, gain in gains.items()},
        "bytes": {name: memory_of(model) for name, model in models.items()},
    }


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    again, tiny, only_prepare = ("--" + word in sys.argv for word in ("again", "tiny", "prepare"))
    seconds = next((float(word.partition("=")[2]) for word in sys.argv if word.startswith("--seconds=")), 30.0)
    lengths = [int(word) for word in words if word.isdigit()] or list(LENGTHS)
    parts = [word for word in words if not word.isdigit()] or ["tokens", "single"]
    results = "residual_latency_tiny" if tiny else "residual_latency"
    torch.set_num_threads(2)
    cells = [(18, 3, length) for length in lengths if "tokens" in parts]
    cells += [(layers, k, 1) for layers in DEPTHS for k in GROUPS if "single" in parts]
    found = load(results)
    with torch.no_grad():
        for layers, k, length in dict.fromkeys(cells):
            name = f"L = {layers}, K = {k}, T = {length}"
            if only_prepare:
                functions(variants(layers, k, length, tiny), frames(length, tiny))
            elif again or name not in found:
                found[name] = measure(layers, k, length, seconds, tiny)
                print(name, json.dumps(found[name]), flush=True)
                save(results, found)


if __name__ == "__main__":
    main()
