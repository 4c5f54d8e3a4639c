"""What tests do with a model: call it, read its outputs and gradients, look into its graphs, remember its state."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree

import fxreuse
from fxreuse.frontend import lengths
from fxreuse.map_workspace import attention_map
from fxreuse.program import Program

Inputs = tuple[Any, ...] | dict[str, Any]
Gradients = dict[str, torch.Tensor | None]

# The module: its name in the package is that of the function.
apply_module = importlib.import_module("fxreuse.apply")

_MAPS = {
    torch.ops.aten.softmax.int,
    torch.ops.aten._softmax.default,
    torch.ops.aten._safe_softmax.default,
    torch.ops.aten.scaled_dot_product_attention.default,
    attention_map,
}


def call(model: torch.nn.Module, inputs: Inputs) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def call_original(model: torch.nn.Module, inputs: Inputs) -> Any:
    """A model as it is before a rewrite; without the key-value cache, which a rewritten one does not have."""
    if getattr(getattr(model, "config", None), "use_cache", False) and isinstance(inputs, dict):
        return model(**inputs, use_cache=False)
    return call(model, inputs)


def apply_captured(
    model: torch.nn.Module,
    program: Program,
    plan: str,
    *inputs: Any,
    fixed: Callable[[], Program] | None = None,
    **options: Any,
) -> Any:
    """What `fxreuse.apply` makes of a model that was captured before: no pass changes the program that it is given.

    ``fixed`` gives the program with its lengths fixed, for plans that need that.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apply_module, "load_program", lambda *_: program)
        if fixed is not None:
            patch.setattr(lengths, "load_program", lambda *_, **__: fixed())
        return fxreuse.apply(model, plan, *inputs, **options)


def cast(inputs: Inputs, to: torch.dtype | str) -> Inputs:
    """The inputs at another floating dtype, or on another device."""

    def move(value: torch.Tensor) -> torch.Tensor:
        return value if isinstance(to, torch.dtype) and not value.is_floating_point() else value.to(to)

    return pytree.tree_map_only(torch.Tensor, move, inputs)


def named_tensors(output: Any) -> dict[str, torch.Tensor]:
    """The tensors of an output by their place in it."""
    leaves, _ = pytree.tree_flatten_with_path(output)
    return {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}


def assert_same(actual: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Outputs of the same class with the same fields whose tensors are equal, bit by bit or to a tolerance."""
    assert type(actual) is type(expected)
    found, wanted = named_tensors(actual), named_tensors(expected)
    assert list(found) == list(wanted)
    for place, tensor in wanted.items():
        torch.testing.assert_close(
            found[place], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, place=place: f"output{place}: {text}"
        )


def gradients(model: torch.nn.Module, output: Any) -> Gradients:
    """The gradients of the sum of squares of all outputs, by parameter; those that the model had are dropped."""
    model.zero_grad(set_to_none=True)
    floating = [tensor for tensor in named_tensors(output).values() if tensor.is_floating_point()]
    sum((tensor * tensor).sum() for tensor in floating).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(actual: Gradients, expected: Gradients, tolerance: float = 0.0) -> None:
    """Equal gradients, relative to the largest of each. Of a parameter that was cut, those of what was kept."""
    for name, gradient in actual.items():
        wanted = expected[name]
        assert (gradient is None) == (wanted is None), f"{name}: only one of the two has a gradient"
        if gradient is not None and wanted is not None:
            gradient, wanted = live_parts(gradient, wanted, name)
            scale = float(wanted.abs().max()) if wanted.numel() else 0.0
            torch.testing.assert_close(
                gradient,
                wanted,
                rtol=0.0,
                atol=tolerance * max(scale, 1.0),
                msg=lambda text, name=name: f"gradient of {name}: {text}",
            )


def live_parts(cut: torch.Tensor, whole: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The slices that are not zero of two gradients, along the dimension in which one parameter is a cut of the other.

    A slice that was kept may have no gradient either, where dropout left nothing of it.
    """
    for dim, (have, want) in enumerate(zip(whole.shape, cut.shape, strict=True)):
        if have != want:
            live = [torch.stack([part.any() for part in side.unbind(dim)]) for side in (cut, whole)]
            assert live[1].sum() <= want, f"{name}: {int(live[1].sum())} slices have a gradient, {want} were kept"
            cut, whole = (
                side.index_select(dim, at.nonzero().flatten()) for side, at in zip((cut, whole), live, strict=True)
            )
    return cut, whole


def seeded_step(model: torch.nn.Module, forward: Any, seed: int = 7) -> tuple[Any, Gradients]:
    """Output and gradients of one training step from a seed."""
    model.train()
    torch.manual_seed(seed)
    output = forward()
    return output, gradients(model, output)


def graphs(module: torch.nn.Module) -> Iterator[fx.Graph]:
    """The graphs of a rewritten model: its own and those of its outlined layers, each once."""
    seen: set[int] = set()
    for part in module.modules():
        graph = getattr(part, "graph", None)
        if isinstance(graph, fx.Graph) and id(graph) not in seen:
            seen.add(id(graph))
            yield graph


def count_maps(module: torch.nn.Module) -> int:
    """How many softmaxes and fused attentions there are in the graphs of a rewritten model."""
    return sum(node.target in _MAPS for graph in graphs(module) for node in graph.nodes)


def snapshot(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Everything about a model, and about the process around it, that a call must not change, by kind and name."""
    modules = dict(model.named_modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    hooks = {name: [len(part.__dict__[key]) for key in _hook_kinds(part)] for name, part in modules.items()}
    return {
        "mode": {name: part.training for name, part in modules.items()},
        "attributes": {name: sorted(part.__dict__) for name, part in modules.items()},
        "hooks": hooks,
        "identity": {name: id(tensor) for name, tensor in tensors.items()},
        "gradients": {name: parameter.grad is None for name, parameter in model.named_parameters()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "values": {name: (tensor.dtype, tensor.device, tensor.tolist()) for name, tensor in tensors.items()},
        "use_cache": {
            name: getattr(getattr(part, "config", None), "use_cache", None) for name, part in modules.items()
        },
        "random": {
            "torch": torch.get_rng_state().tolist(),
            "python": random.getstate(),
            "numpy": numpy.random.get_state()[1].tolist(),
        },
        "globals": {
            "gradients": torch.is_grad_enabled(),
            "dtype": torch.get_default_dtype(),
            "fast path": torch.backends.mha.get_fastpath_enabled(),
        },
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names under which two dictionaries differ."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _hook_kinds(module: torch.nn.Module) -> list[str]:
    return sorted(key for key in module.__dict__ if key.endswith("_hooks"))
