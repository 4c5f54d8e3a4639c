"""What `fxreuse report` of a large model takes: seconds and memory of the whole command, models built without weights.

``python -m benchmarks.large_models`` runs each in a process of its own, on a machine that does nothing else. What has
run is kept; names (llama7b, llama70b) run again.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "large_models.json"

_70B = {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
#: By name: what people call it, its settings beside those of `transformers.LlamaConfig`, and a plan.
MODELS: dict[str, tuple[str, dict[str, int], str | None]] = {
    "llama7b": ("Llama, 7 B", {"num_hidden_layers": 32}, None),
    "llama7b, 2x*": ("Llama, 7 B", {"num_hidden_layers": 32}, "2x*"),
    "llama70b": ("Llama, 70 B", _70B, None),
    "llama70b, 2x*": ("Llama, 70 B", _70B, "2x*"),
}


def main() -> None:
    """Run what has not run, or what is named."""
    data: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}
    for name, (title, settings, plan) in MODELS.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        if name not in data["models"] or sys.argv[1:]:
            data["models"][name] = {"title": title, "settings": settings, "plan": plan, **measured(settings, plan)}
            data |= {"torch": torch.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
            RESULTS.write_text(json.dumps(data, indent=1) + "\n")
        print(name, data["models"][name], flush=True)


def measured(settings: dict[str, int], plan: str | None) -> dict[str, Any]:
    """Seconds on the wall and of processor time, the most memory, and what the report says the model has."""
    command = [sys.executable, "-m", "fxreuse", "report", "transformers:LlamaConfig", "--json"]
    command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    command += ["--plan", plan] if plan else []
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = json.loads(process.stdout.read())
    _, _, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "resident_bytes": usage.ru_maxrss * 1024,
        "params": found["before"]["params"],
        "params_after": found["after"]["params"],
        "macs": found["before"]["macs"],
    }


if __name__ == "__main__":
    main()
