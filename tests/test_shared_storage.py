"""Shared weights are one parameter each: in the tree, in state dicts and files, in copies, compiled and distributed."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import safetensors.torch
import torch

import fxreuse

from .running import assert_same
from .shared_weights import applied, captured, gradients, meaning, size

EXACT = 1e-12


def copies(small: torch.nn.Module) -> dict[str, torch.nn.Module]:
    stored = io.BytesIO()
    torch.save(small.state_dict(), stored)
    stored.seek(0)
    loaded, assigned = copy.deepcopy(small), copy.deepcopy(small)
    for parameter in loaded.parameters():
        torch.nn.init.zeros_(parameter)
    loaded.load_state_dict(torch.load(stored))
    stored.seek(0)
    assigned.load_state_dict(torch.load(stored), assign=True)
    tensors = copy.deepcopy(small)
    tensors.load_state_dict(safetensors.torch.load(safetensors.torch.save(small.state_dict())))
    whole = io.BytesIO()
    torch.save(small, whole)
    whole.seek(0)
    single = copy.deepcopy(small).to(torch.float32).to(torch.float64)
    return {
        "deepcopy": copy.deepcopy(small),
        "pickle": pickle.loads(pickle.dumps(small)),
        "torch.save": torch.load(whole, weights_only=False),
        "load_state_dict": loaded,
        "safetensors": tensors,
        "load_state_dict(assign=True)": assigned,
        "to": single,
    }


@pytest.mark.parametrize(
    "plan", ["share k=2", "residual k=2 r=2 lowering=factored", "residual k=4 r=2 lowering=merged"]
)
def test_storage_is_shared(plan):
    """One parameter for each group: in the tree, in the state dict, on disk, and in every copy, after a step, too."""
    model, program, inputs = captured("thirds")
    small = applied(model, program, plan, inputs)
    small = copy.deepcopy(small)
    state = small.state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == size(small)
    assert set(state) == {name for name, _ in small.named_parameters()}
    for way, twin in copies(small).items():
        tolerance = 1e-5 if way == "to" else EXACT
        assert_same(twin(**inputs), small(**inputs), tolerance)
        assert size(twin) == size(small), way
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        twin(**inputs).square().mean().backward()
        optimizer.step()
        assert_same(twin(**inputs), meaning(model, twin)(**inputs), EXACT)


@pytest.mark.parametrize("plan", ["share k=4", "residual k=4 r=2"])
def test_bytes_on_disk_shrink_as_the_parameters_do(plan, tmp_path):
    """At a width at which names and headers are small beside the weights; no tensor is stored twice."""
    model = torch.nn.Sequential(*(torch.nn.TransformerEncoderLayer(256, 2, 512, batch_first=True) for _ in range(4)))
    small = fxreuse.apply(model.eval(), plan + (" init=zero" if "residual" in plan else ""), torch.randn(2, 5, 256))
    ratio = size(small) / size(model)
    assert ratio < 0.3
    for save, name in ((torch.save, "pt"), (safetensors.torch.save_file, "safetensors")):
        sizes = {}
        for kind, module in (("small", small), ("model", model)):
            save(module.state_dict(), tmp_path / f"{kind}.{name}")
            sizes[kind] = (tmp_path / f"{kind}.{name}").stat().st_size
        assert sizes["small"] / sizes["model"] == pytest.approx(ratio, rel=0.03)


def test_compiled_and_exported_again():
    model, program, inputs = captured("split")
    small = copy.deepcopy(applied(model, program, "residual k=2 r=2 lowering=factored", inputs))
    torch._dynamo.reset()
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    assert_same(compiled(**inputs), small(**inputs), EXACT)
    one = gradients(small, lambda: small(**inputs).square().sum())
    other = gradients(small, lambda: compiled(**inputs).square().sum())
    assert_same(one, other, EXACT)
    again = torch.export.export(small, (), inputs).module()
    assert_same(again(**inputs), small(**inputs), EXACT)


def test_distributed():
    """DDP with gloo in one process: one gradient for each shared parameter."""
    model, program, inputs = captured("split")
    small = copy.deepcopy(applied(model, program, "share k=2 | residual r=2", inputs))
    expected = gradients(small, lambda: small(**inputs).square().sum())
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(small)
        actual = gradients(small, lambda: wrapped(**inputs).square().sum())
    finally:
        torch.distributed.destroy_process_group()
    assert_same(actual, expected, EXACT)
