"""Graphs as functions: they read what a module has at the time of the call, and layers that are alike share one."""

from __future__ import annotations

import copy
import inspect
import traceback

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrize

import fxreuse
from fxreuse.emission.runnable import function_of

aten = torch.ops.aten


def reader(path: str = "inner.weight", name: str = "x") -> fx.Graph:
    """x times what is at a path."""
    graph = fx.Graph()
    x = graph.placeholder(name)
    graph.output(graph.call_function(aten.mul.Tensor, (x, graph.get_attr(path))))
    return graph


class Owner(nn.Module):
    def __init__(self, value: float = 2.0) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.tensor(value))


ONE = torch.tensor(1.0)


class Doubled(nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return 2 * value


class Forwarding(nn.Module):
    """Gives the attributes of another module for its own, as sharding wrappers do."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)


def with_parametrization(owner: Owner) -> None:
    parametrize.register_parametrization(owner.inner, "weight", Doubled())


def with_a_plain_tensor(owner: Owner) -> None:
    value = 2 * owner.inner.weight.detach()
    del owner.inner.weight
    owner.inner.weight = value


def with_a_buffer(owner: Owner) -> None:
    value = 2 * owner.inner.weight.detach()
    del owner.inner.weight
    owner.inner.register_buffer("weight", value)


def with_another_module(owner: Owner) -> None:
    owner.inner = Owner(4.0).inner


def with_a_wrapper(owner: Owner) -> None:
    owner.inner = Forwarding(Owner(4.0).inner)


CHANGES = [with_parametrization, with_a_plain_tensor, with_a_buffer, with_another_module, with_a_wrapper]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_reads_what_is_there_now(change, compiled):
    owner, function = Owner(), function_of(reader())
    assert function(owner, ONE) == 2
    change(owner)
    if compiled:
        function = torch.compile(function, backend="eager", fullgraph=True)
    assert function(owner, ONE) == 4


def test_functional_call():
    """Parameters that are put in place for one call are read in that call."""
    inputs = torch.randn(1, 4, 16)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
    small = fxreuse.apply(model, "residual k=2 r=2", inputs)
    twice = {name: 2 * value for name, value in small.named_parameters()}
    other = copy.deepcopy(small)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert torch.equal(torch.func.functional_call(small, twice, (inputs,)), other(inputs))


def test_alike_graphs_share_one_function():
    """Numbers of layers in names make no difference; a path, an operator, or an argument does."""
    first = function_of(reader(name="linear_3"))
    assert function_of(reader(name="linear_12")) is first
    assert function_of(reader("other.weight", name="linear_3")) is not first
    assert function_of(reader("inner.0.weight", name="linear_3")) is not function_of(reader("inner.1.weight"))


def test_values_whose_names_differ_by_a_number_stay_apart():
    graph = fx.Graph()
    x_1, x_2 = graph.placeholder("x_1"), graph.placeholder("x_2")
    parts = [graph.get_attr("inner.weight"), graph.get_attr("inner_weight"), graph.get_attr("inner.0.weight")]
    value = graph.call_function(aten.sub.Tensor, (x_1, x_2))
    for part in parts:
        value = graph.call_function(aten.add.Tensor, (graph.call_function(aten.mul.Tensor, (value, 10)), part))
    graph.output(value)
    owner = Owner()
    owner.inner_weight = nn.Parameter(torch.tensor(3.0))
    owner.inner.add_module("0", nn.ParameterDict({"weight": torch.tensor(4.0)}))
    assert function_of(graph)(owner, torch.tensor(9.0), torch.tensor(8.0)) == 1234


@pytest.mark.parametrize("name", ["lambda_", "self", "torch", "device", "input", "_3"])
def test_names_that_mean_something_in_python(name):
    assert function_of(reader(name=name))(Owner(), ONE) == 2


def test_the_graph_is_not_changed_and_no_inputs_are_needed():
    graph = fx.Graph()
    graph.output(graph.get_attr("inner.weight"))
    before = str(graph)
    assert function_of(graph)(Owner()) == 2
    assert str(graph) == before


def test_layers_of_a_model_run_the_same_code_and_errors_show_its_line():
    inputs = torch.randn(1, 4, 16)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval()
    small = fxreuse.apply(model, "share k=3", inputs)
    runs = [layer._run for layer in small.layers]
    assert len(set(runs)) < len(runs)
    assert runs[1] is runs[2]
    small.layers[1].norm1 = nn.Identity()
    small.layers[1].norm1.forward = lambda value: value[..., :3]
    with pytest.raises(RuntimeError) as error:
        small(inputs)
    lines = [frame.line for frame in traceback.extract_tb(error.tb)]
    assert any(line in inspect.getsource(runs[1]) for line in lines if line)
