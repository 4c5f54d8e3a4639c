"""The identity plan against the original, eager and compiled: capture and emission must cost nothing.

    python benchmarks/identity.py            # writes benchmarks/results/identity.json, case by case; resumable
    python benchmarks/tables.py              # writes the tables in docs/measurements.md

Sizes are those of the base models, cut to 4 layers; weights are random. Every case is one interleaved run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import fxreuse
from fxreuse.checking.measure import interleaved

RESULTS = Path(__file__).parent / "results" / "identity.json"
WIDE = {"num_hidden_layers": 4}


def ids(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(5, 1000, (batch, length))}


def padded(batch: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length // 2 :] = 0
    return {**ids(batch, length), "attention_mask": mask}


def encoder() -> torch.nn.Module:
    layer = torch.nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


CASES: dict[str, Callable[[], tuple[torch.nn.Module, Any]]] = {
    "BERT, 2×128": lambda: (tf.BertModel(tf.BertConfig(**WIDE)), ids(2, 128)),
    "BERT, padding mask, 2×128": lambda: (tf.BertModel(tf.BertConfig(**WIDE)), padded(2, 128)),
    "BERT, 1×512": lambda: (tf.BertModel(tf.BertConfig(**WIDE)), ids(1, 512)),
    "GPT-2, 1×512": lambda: (tf.GPT2Model(tf.GPT2Config(n_layer=4, bos_token_id=1, eos_token_id=2)), ids(1, 512)),
    "Llama (768 wide), 1×512": lambda: (
        tf.LlamaModel(
            tf.LlamaConfig(
                **WIDE,
                vocab_size=2000,
                hidden_size=768,
                intermediate_size=2048,
                num_attention_heads=12,
                num_key_value_heads=4,
            )
        ),
        ids(1, 512),
    ),
    "T5 encoder, 1×512": lambda: (tf.T5EncoderModel(tf.T5Config(num_layers=4, d_model=512)), ids(1, 512)),
    "ViT, 2×224²": lambda: (tf.ViTModel(tf.ViTConfig(**WIDE)), {"pixel_values": torch.randn(2, 3, 224, 224)}),
    "HuBERT, 1×2 s": lambda: (tf.HubertModel(tf.HubertConfig(**WIDE)), {"input_values": torch.randn(1, 32000)}),
    "nn.TransformerEncoder, 2×256": lambda: (encoder(), (torch.randn(2, 256, 768),)),
}


def measure(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    model.eval()
    if hasattr(model, "config") and hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    same = fxreuse.apply(model, "1x*", inputs)
    args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
    models = {"original": model, "identity": same}
    run: dict[str, Callable[[], object]] = {}
    with torch.no_grad():
        for kind, module in models.items():
            run[f"{kind}, eager"] = lambda module=module: module(*args, **kwargs)
            compiled = torch.compile(module, fullgraph=kind == "identity")
            run[f"{kind}, compiled"] = lambda compiled=compiled: compiled(*args, **kwargs)
        timings = interleaved(run, seconds=10.0, rounds=15)
    row: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for mode in ("eager", "compiled"):
        gain = timings[f"identity, {mode}"].speedup_over(timings[f"original, {mode}"])
        row[mode] = {
            "original_ms": 1e3 * timings[f"original, {mode}"].seconds.median,
            "identity_ms": 1e3 * timings[f"identity, {mode}"].seconds.median,
            "ratio": gain.median,
            "low": gain.low,
            "high": gain.high,
        }
    return row


def main() -> None:
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in CASES:
        if name in found and "--again" not in sys.argv:
            continue
        torch.compiler.reset()
        print(f"measuring {name}", flush=True)
        found[name] = measure(name)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
