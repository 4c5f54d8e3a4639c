"""What rewriting costs: `fxreuse.apply` against `torch.export.export` alone, and recognition by number of layers.

    python benchmarks/overhead.py            # writes benchmarks/results/overhead.json, case by case; resumable
    python benchmarks/overhead.py --again    # measures anew what is there; --only=export: of cases that start so
    python benchmarks/tables.py              # writes the tables in docs/measurements.md

Every case runs in a process of its own. Times are CPU seconds of that process, medians over interleaved rounds after
one that is not counted: a capture runs on one thread, so that they are what one waits for on an idle machine. Weights
are random; those of the large models are on the meta device and do not exist.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch.export import Dim

import fxreuse
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program

RESULTS = Path(__file__).parent / "results" / "overhead.json"
ROUNDS = 7
TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}
LLAMA = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}

Case = Callable[[], dict[str, Any]]


def ids(length: int = 7) -> torch.Tensor:
    return torch.randint(1, 60, (2, length))


def bert(layers: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    inputs = {"input_ids": ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    return tf.BertModel(tf.BertConfig(**TINY, num_hidden_layers=layers)), inputs


def llama(layers: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    return tf.LlamaModel(tf.LlamaConfig(**TINY, num_hidden_layers=layers, num_key_value_heads=1)), {"input_ids": ids()}


def gpt2(layers: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config = tf.GPT2Config(vocab_size=64, n_embd=16, n_head=2, n_layer=layers, bos_token_id=1, eos_token_id=2)
    return tf.GPT2Model(config), {"input_ids": ids()}


def t5(layers: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config = tf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=layers // 2, num_heads=2)
    return tf.T5Model(config), {"input_ids": ids(), "decoder_input_ids": ids(5)}


def hubert(seconds: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    return tf.HubertModel(tf.HubertConfig()), {"input_values": torch.randn(2, 16000 * seconds)}


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def against_export(model: torch.nn.Module, inputs: dict[str, torch.Tensor], plan: str) -> dict[str, Any]:
    """Apply and export alone, with the same free sizes, in turn."""
    model.eval()
    shapes = {name: dict.fromkeys(range(tensor.ndim), Dim.AUTO) for name, tensor in inputs.items()}

    def export() -> None:
        torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)

    def rewrite() -> None:
        fxreuse.apply(model, plan, inputs)

    rounds = [(cpu_seconds(export), cpu_seconds(rewrite)) for _ in range(ROUNDS + 1)][1:]
    ratios = [rewriting / exporting for exporting, rewriting in rounds]
    return {
        "export_s": statistics.median(exporting for exporting, _ in rounds),
        "apply_s": statistics.median(rewriting for _, rewriting in rounds),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }


def recognition(make: Callable[[int], tuple[torch.nn.Module, dict[str, torch.Tensor]]], layers: int) -> dict[str, Any]:
    """Capture with normalisation, once, and find."""
    model, inputs = make(layers)
    program = load_program(model.eval(), inputs)
    capturing = cpu_seconds(lambda: load_program(model, inputs))
    times = [cpu_seconds(lambda: find(program)) for _ in range(ROUNDS)]
    sites = find(program)
    return {"sites": len(sites), "capture_s": capturing, "find_s": statistics.median(times), "slowest_s": max(times)}


def on_meta(shape: str) -> dict[str, Any]:
    """A model that does not exist, captured and recognised."""
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA[shape], num_key_value_heads=8)).eval()
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    programs = []
    capturing = cpu_seconds(lambda: programs.append(load_program(model, {"input_ids": ids()})))
    finding = cpu_seconds(lambda: find(programs[0]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"sites": len(find(programs[0])), "capture_s": capturing, "find_s": finding}
    return {**found, "peak_gib": peak / 2**20, "before_gib": started / 2**20}


CASES: dict[str, Case] = {
    "export: HuBERT-base, 1 s of audio": lambda: against_export(*hubert(1), "2x6"),
    "export: HuBERT-base, 10 s of audio": lambda: against_export(*hubert(10), "2x6"),
    **{
        f"layers: {name}, {layers}": lambda make=make, layers=layers: recognition(make, layers)  # type: ignore[misc]
        for name, make in (("BERT", bert), ("Llama", llama), ("GPT-2", gpt2), ("T5", t5))
        for layers in (12, 24, 48)
    },
    **{f"meta: Llama {shape}": lambda shape=shape: on_meta(shape) for shape in LLAMA},  # type: ignore[misc]
}


def main() -> None:
    if "--case" in sys.argv:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        print(json.dumps(CASES[sys.argv[-1]]()))
        return
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    only = next((argument.removeprefix("--only=") for argument in sys.argv if argument.startswith("--only=")), "")
    for name in CASES:
        if not name.startswith(only) or (name in found and "--again" not in sys.argv):
            continue
        print(f"measuring {name}", flush=True)
        run = subprocess.run([sys.executable, __file__, "--case", name], capture_output=True, text=True, check=True)
        found[name] = {**json.loads(run.stdout.splitlines()[-1]), "torch": torch.__version__}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
