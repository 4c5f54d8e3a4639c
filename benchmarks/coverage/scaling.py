"""How long recognition takes on a captured program, by the number of layers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program

LAYERS = (12, 24, 48)
REPEATS = 5
_TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}

MODELS: dict[str, Callable[[int], torch.nn.Module]] = {
    "BERT": lambda layers: hf.BertModel(hf.BertConfig(num_hidden_layers=layers, **_TINY)),
    "Llama": lambda layers: hf.LlamaModel(hf.LlamaConfig(num_hidden_layers=layers, num_key_value_heads=2, **_TINY)),
}


def measure(model: str, layers: int) -> dict[str, Any]:
    """CPU seconds of one capture, and the fewest of several recognitions on it."""
    module = MODELS[model](layers).eval()
    inputs = {"input_ids": torch.randint(5, 99, (2, 11)), "attention_mask": torch.ones(2, 11, dtype=torch.long)}
    begun = time.process_time()
    program = load_program(module, inputs)
    capture = time.process_time() - begun
    seconds = []
    for _ in range(REPEATS):
        begun = time.process_time()
        sites = find(program)
        seconds.append(time.process_time() - begun)
    nodes = len(program.graph.nodes)
    return {"layers": layers, "found": len(sites), "nodes": nodes, "capture": round(capture, 2), "find": min(seconds)}
