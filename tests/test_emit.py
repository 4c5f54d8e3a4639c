"""The module that comes out: layers at their original paths, with code of their own, and what they share outside."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers as hf
from torch import fx, nn

import fxreuse
from fxreuse.checking.reference import MapSharing
from fxreuse.emission.emit import emit
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program
from fxreuse.passes.fold_modules import fold_modules
from fxreuse.program import Program, module_path
from fxreuse.record import Record

from .architectures import randomise
from .captures import captured
from .handwritten import Attention
from .running import apply_captured, assert_same, call, count_maps, gradients

TINY = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {"vocab_size": 99, "max_position_embeddings": 32}


def padded() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 99, (2, 7)), "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}


def albert() -> nn.Module:
    return randomise(hf.AlbertModel(hf.AlbertConfig(embedding_size=8, **TEXT, **TINY)))


def architecture(name: str, plan: str) -> tuple[nn.Module, nn.Module, Any]:
    found = captured(name)
    return found.model, found.apply(plan), found.case.inputs


@functools.cache
def albert_program() -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    model = albert()
    return model, load_program(model, padded())


@pytest.fixture(scope="module")
def stored() -> tuple[nn.Module, nn.Module, Any]:
    return architecture("bert_padded", "2x* lowering=materialize")


@pytest.fixture(scope="module")
def again() -> tuple[nn.Module, nn.Module, Any]:
    return architecture("bert_padded", "2x* lowering=recompute")


@pytest.fixture(scope="module")
def repeated() -> tuple[nn.Module, nn.Module, Any]:
    model, program = albert_program()
    return model, apply_captured(model, program, "2x*"), padded()


def takes(layer: nn.Module) -> list[fx.Node]:
    return layer.graph.find_nodes(op="placeholder")


def gives(layer: nn.Module) -> list[fx.Node]:
    (result,) = layer.graph.output_node().args
    return list(result) if isinstance(result, tuple) else [result]


def calls(outer: nn.Module) -> dict[str, fx.Node]:
    return {node.target: node for node in outer.graph.find_nodes(op="call_module")}


def operators(module: nn.Module) -> list[str]:
    """The names of the operators of a module's own graph."""
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def shapes_between(outer: nn.Module, template: str, inputs: Any) -> list[tuple[list[tuple], list[tuple]]]:
    """For every layer the shapes of the tensors that go in and come out in one call."""
    seen: list[tuple[list[tuple], list[tuple]]] = []

    def record(_: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        results = result if isinstance(result, tuple) else (result,)
        seen.append(tuple([tuple(x.shape) for x in xs if isinstance(x, torch.Tensor)] for xs in (args, results)))

    handles = [outer.get_submodule(template.format(i)).register_forward_hook(record) for i in range(4)]
    call(outer, inputs)
    for handle in handles:
        handle.remove()
    return seen


def test_is_named_like_the_model(stored: tuple) -> None:
    model, small, _ = stored
    assert repr(small).startswith("BertModel(")
    assert small.encoder.layer[0]._get_name() == type(model.encoder.layer[0]).__name__


def test_layers_are_in_a_list_and_show_their_code(stored: tuple) -> None:
    _, small, _ = stored
    assert isinstance(small.encoder.layer, nn.ModuleList)
    assert len(small.encoder.layer) == 4
    assert [small.encoder.layer[i] is small.get_submodule(f"encoder.layer.{i}") for i in range(4)] == [True] * 4
    leader, follower = small.encoder.layer[0], small.encoder.layer[-1]
    assert "def forward(self, hidden_states" in leader.code
    assert "attention_map(" in leader.code
    assert "attention_map(" not in follower.code
    assert "softmax" not in follower.code


def test_the_outer_graph_calls_every_layer_once_in_order(stored: tuple) -> None:
    _, small, _ = stored
    called = [node.target for node in small.graph.find_nodes(op="call_module")]
    assert [path for path in called if path.startswith("encoder.layer.")] == [f"encoder.layer.{i}" for i in range(4)]


def test_repr_shows_what_a_layer_takes_and_gives(stored: tuple) -> None:
    _, small, _ = stored
    for layer in small.encoder.layer:
        said = layer.extra_repr()
        assert said.startswith("takes hidden_states")
        assert [node.name for node in (*takes(layer), *gives(layer)) if node.name not in said] == []
        assert said in repr(small)


def test_a_stored_map_goes_from_leader_to_follower(stored: tuple) -> None:
    _, small, inputs = stored
    hidden, attention = (2, 11, 32), (2, 4, 11, 11)
    for index, (received, returned) in enumerate(shapes_between(small, "encoder.layer.{}", inputs)):
        assert received[0] == returned[0] == hidden
        if index % 2:
            assert attention in received[1:]
            assert returned == [hidden]
        else:
            assert returned == [hidden, attention]
    assert count_maps(small) == 2


def test_queries_and_keys_go_from_leader_to_follower(again: tuple) -> None:
    _, small, inputs = again
    hidden, heads = (2, 11, 32), (2, 4, 11, 8)
    for index, (received, returned) in enumerate(shapes_between(small, "encoder.layer.{}", inputs)):
        assert received[0] == returned[0] == hidden
        if index % 2:
            assert received.count(heads) == 2
            assert returned == [hidden]
        else:
            assert returned == [hidden, heads, heads]


def test_the_map_that_a_follower_gets_is_its_leaders(stored: tuple) -> None:
    _, small, _ = stored
    outer = calls(small)
    for index in (1, 3):
        read = outer[f"encoder.layer.{index}"].all_input_nodes
        leader = outer[f"encoder.layer.{index - 1}"]
        assert sum(leader in node.all_input_nodes for node in read) == 2  # hidden states and map


def test_a_layer_can_be_called_by_itself(stored: tuple) -> None:
    _, small, inputs = stored
    layer, seen = small.encoder.layer[1], []
    handle = layer.register_forward_hook(lambda _, args, result: seen.append((args, result)))
    call(small, inputs)
    handle.remove()
    ((args, result),) = seen
    assert torch.equal(layer(*args), result)
    assert not torch.equal(layer(args[0] + 1, *args[1:]), result)


@pytest.mark.parametrize(
    "path", ["encoder.layer.1", "encoder.layer.1.attention.self.value", "encoder.layer.0.output.dense"]
)
def test_hooks_fire_and_count(stored: tuple, path: str) -> None:
    _, small, inputs = stored
    part, order = small.get_submodule(path), []
    expected = call(small, inputs).last_hidden_state

    def double(_: nn.Module, args: tuple, result: Any) -> Any:
        order.append("after")
        return 2 * result

    before = part.register_forward_pre_hook(lambda *_: order.append("before"))
    after = part.register_forward_hook(double)
    changed = call(small, inputs).last_hidden_state
    before.remove()
    after.remove()
    assert order == ["before", "after"]
    assert not torch.allclose(changed, expected)
    assert torch.equal(call(small, inputs).last_hidden_state, expected)


def test_folded_modules_are_of_their_own_class(stored: tuple) -> None:
    model, small, _ = stored
    for path in ("encoder.layer.1.attention.self.value", "embeddings.word_embeddings", "embeddings.LayerNorm"):
        assert type(small.get_submodule(path)) is type(model.get_submodule(path))
        assert small.get_submodule(path).weight is model.get_submodule(path).weight


def test_t5_computes_its_bias_once_and_outside() -> None:
    _, small, _ = architecture("t5_encoder_padded", "1x*")
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    assert table in calls(small)
    assert "aten.log.default" in operators(small)
    for layer in small.encoder.block:
        assert not {"aten.log.default", "aten.arange.default", "aten.embedding.default"} & set(operators(layer))
        assert not any("relative_attention_bias" in target for target in calls(layer))
    readers = [set(calls(small)[f"encoder.block.{i}"].all_input_nodes) for i in range(4)]
    assert len(set.intersection(*readers)) >= 2  # the mask and the bias


def test_rotary_tables_and_masks_are_outside() -> None:
    _, small, _ = architecture("llama_padded", "1x*")
    assert operators(small).count("aten.cos.default") == 1
    for layer in small.model.layers:
        assert not {"aten.cos.default", "aten.sin.default", "aten.arange.default"} & set(operators(layer))


def test_non_persistent_buffers_stay_so(stored: tuple) -> None:
    model, small, _ = stored
    hidden = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    kept = {name for name, _ in small.named_buffers()}
    assert hidden & kept
    assert not hidden & small.state_dict().keys()


def test_a_repeated_module_is_called_layer_by_layer(repeated: tuple) -> None:
    _, small, inputs = repeated
    path = "encoder.albert_layer_groups.0.albert_layers.0"
    assert [target for target in calls(small) if target.startswith(path)] == [f"{path}@{i}" for i in range(4)]
    hidden, attention = (2, 7, 16), (2, 2, 7, 7)
    for index, (received, returned) in enumerate(shapes_between(small, path + "@{}", inputs)):
        assert received[0] == returned[0] == hidden
        assert (attention in received) == bool(index % 2)
        assert (attention in returned) == (index % 2 == 0)


def test_a_repeated_module_keeps_its_parameters_once(repeated: tuple) -> None:
    model, small, _ = repeated
    assert set(small.state_dict()) == set(model.state_dict())
    found = dict(small.named_parameters(remove_duplicate=False))
    originals = dict(model.named_parameters())
    assert found.keys() == originals.keys()
    assert all(found[name] is parameter for name, parameter in originals.items())


def test_gradients_of_a_repeated_module_add_up() -> None:
    (model, program), inputs = albert_program(), padded()
    small = apply_captured(model, program, "1x*")
    model, small = copy.deepcopy(model).double(), copy.deepcopy(small).double()
    expected, found = gradients(model, call(model, inputs)), gradients(small, call(small, inputs))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


class Residual(Attention):
    """A layer that may be given a module which is not its own."""

    def forward(self, x: torch.Tensor, gate: nn.Module | None = None) -> torch.Tensor:
        q, k, v = (self.split(project(x)).transpose(1, 2) for project in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + (y if gate is None else torch.sigmoid(gate(y)) * y)


class Gated(nn.Module):
    """One layer is given a module of the host's."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual() for _ in range(3))
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x, self.gate if index == 1 else None)
        return x


def outline_notes(small: nn.Module) -> dict[str, str]:
    return {note.where: note.text for note in fxreuse.describe(small).notes if note.kind == "outline"}


@pytest.mark.parametrize("gate", [nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(5)], ids=lambda g: type(g).__name__)
def test_a_layer_that_calls_a_module_of_the_host(gate: nn.Module) -> None:
    model, x = randomise(Gated(gate)), torch.randn(3, 5, 8)
    small = fxreuse.apply(model, "1x*", x)
    assert set(small.state_dict()) == set(model.state_dict())
    assert_same(small(x), model(x), 1e-6)
    assert "layers.0" in calls(small)
    assert "layers.2" in calls(small)


def test_a_layer_with_something_between_its_parts_stays_flat() -> None:
    """What is between depends on the layer and feeds it, so that no one call could stand for the layer."""
    torch.manual_seed(0)
    model, x = randomise(Gated(nn.Identity())), torch.randn(3, 5, 8)
    program = load_program(model, x)
    sites = find(program)
    (between,) = (
        node
        for node in program.graph.nodes
        if "scaled_dot_product" in str(node.target) and module_path(node) == "layers.1"
    )
    between.meta["nn_module_stack"] = {}
    record = Record("1x*", {}, ())
    small = emit(fold_modules(program), record, [site.layer_path for site in sites], {"": False})
    notes = outline_notes(small)
    assert list(notes) == ["layers.1"]
    assert between.name in notes["layers.1"]
    assert "layers.1" not in calls(small)
    assert {"layers.0", "layers.2", "layers.1.q"} <= calls(small).keys()
    assert_same(small(x), model(x))


class Tabled(Attention):
    """Attention with a bias from a table of its own, whose index is written in place (as BEiT does)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = torch.zeros(5, 5, dtype=torch.long, device=x.device)
        index[1:, 1:] = 1
        index[0, 2:] += 2
        index[3:, 0].fill_(3)
        q, k, v = (self.split(project(x)).transpose(1, 2) for project in (self.q, self.k, self.v))
        bias = self.table[index.view(-1)].view(5, 5, 2).permute(2, 0, 1)
        return x + ((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("lowering", ["materialize", "recompute"])
def test_a_shared_table_is_written_before_it_is_read(lowering: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Tabled(), Tabled(), Tabled()).double().eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    small = fxreuse.apply(model, f"3x1 lowering={lowering}", x)
    assert outline_notes(small) == {}
    assert not [name for name in operators(small.get_submodule("1")) if "_." in name or "zeros" in name]
    with MapSharing(model, {("1", 0): ("0", 0), ("2", 0): ("0", 0)}):
        expected = model(x)
    torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-12)


def test_nothing_is_noted_where_every_layer_is_outlined(stored: tuple) -> None:
    assert outline_notes(stored[1]) == {}


def test_parameters_of_outlined_layers_are_not_read_outside(stored: tuple) -> None:
    """Whoever shards or offloads a layer finds its parameters touched by that layer alone."""
    _, small, _ = stored
    read = [str(node.target) for node in small.graph.find_nodes(op="get_attr")]
    assert [path for path in read if path.startswith("encoder.layer.")] == []


def test_every_module_keeps_its_mode() -> None:
    torch.manual_seed(0)
    found = captured("bert_padded")
    model = copy.deepcopy(found.model).train()
    model.encoder.layer[1].eval()
    model.encoder.layer[2].output.dropout.eval()
    small = apply_captured(model, found.program, "2x*")
    modes = {path: module.training for path, module in model.named_modules()}
    assert set(modes.values()) == {True, False}
    found = {path: module.training for path, module in small.named_modules()}
    common = found.keys() & modes.keys()
    assert {"", "encoder.layer.1", "encoder.layer.2.output.dropout", "encoder.layer.3"} <= common
    assert {path: found[path] for path in common} == {path: modes[path] for path in common}
    added = randomise(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)).train()
    added.layers[1].eval()
    small = fxreuse.apply(added, "1x*", torch.randn(2, 5, 16))
    assert [small.layers[i].self_attn.dropout_p.training for i in range(2)] == [True, False]
