"""A rewritten model does what any `torch.nn.Module` does: it is copied, moved, saved, compiled and trained."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

import fxreuse
from fxreuse.frontend.load import load_program
from fxreuse.program import Program

from .architectures import randomise
from .handwritten import Attention
from .running import apply_captured, assert_same, assert_same_gradients, call, gradients, seeded_step

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def encoder(layers: int = 3) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return randomise(nn.TransformerEncoder(layer, layers, enable_nested_tensor=False))


@functools.cache
def captured() -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    model = encoder()
    return model, load_program(model, x())


PLANS = {
    "materialize": "2x* lowering=materialize",
    "recompute": "2x* lowering=recompute",
    "widened": "2(H4)x* values=2 ffn=40 lowering=recompute",
}


@pytest.fixture(scope="module", params=list(PLANS.values()), ids=list(PLANS))
def made(request: pytest.FixtureRequest) -> nn.Module:
    model, program = captured()
    torch.manual_seed(0)
    return apply_captured(model, program, request.param)


@pytest.fixture
def small(made: nn.Module) -> nn.Module:
    """With parameters of its own for every test."""
    return copy.deepcopy(made)


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    torch.manual_seed(0)
    model = randomise(hf.BertModel(hf.BertConfig(vocab_size=99, max_position_embeddings=32, **TINY)))
    return fxreuse.apply(model, "2x*", {"input_ids": ids()})


def x(*sizes: int) -> torch.Tensor:
    return torch.randn(*(sizes or (2, 5)), 16)


def ids() -> torch.Tensor:
    return torch.randint(3, 99, (2, 7))


def pointers(model: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in model.state_dict().values()}


def test_deepcopy_has_parameters_of_its_own(small: nn.Module) -> None:
    twin, given = copy.deepcopy(small), x()
    assert not pointers(twin) & pointers(small)
    expected = small(given)
    assert torch.equal(twin(given), expected)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert torch.equal(twin(given), expected)
    assert not torch.equal(small(given), expected)


def test_deepcopy_keeps_hooks(small: nn.Module) -> None:
    given = x()
    expected = small(given)
    small.layers[1].register_forward_hook(lambda _, args, result: 2 * result)
    small.register_forward_hook(lambda _, args, result: result + 1)
    changed = small(given)
    assert not torch.allclose(changed, expected + 1)
    assert torch.equal(copy.deepcopy(small)(given), changed)


def test_deepcopy_keeps_what_a_user_adds(small: nn.Module) -> None:
    small.layers[0].tag = {"note": [1]}
    small.layers[0].linear1 = nn.Sequential(small.layers[0].linear1, nn.Tanh())
    twin = copy.deepcopy(small)
    given = x()
    assert twin.layers[0].tag == {"note": [1]}
    assert twin.layers[0].tag is not small.layers[0].tag
    assert torch.equal(twin(given), small(given))


def test_copy_shares_parameters_and_is_called_by_itself(small: nn.Module) -> None:
    twin, given = copy.copy(small), x()
    expected = small(given)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in small.parameters()]
    del small
    assert torch.equal(twin(given), expected)


class Private(Attention):
    """A class that the process which loads the pickle does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(project(x)).transpose(1, 2) for project in (self.q, self.k, self.v))
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_is_unpickled_where_the_original_class_is_not(tmp_path: Path) -> None:
    given = torch.randn(3, 5, 8)
    small = fxreuse.apply(nn.Sequential(Private(), Private()).eval(), "2x1", given)
    (tmp_path / "model").write_bytes(pickle.dumps(small))
    torch.save((given, small(given)), tmp_path / "data")
    assert b"Private" in (tmp_path / "model").read_bytes()  # as a name for people only
    program = """if True:
        import pickle, sys, torch
        given, expected = torch.load("data")
        small = pickle.load(open("model", "rb"))
        assert torch.equal(small(given), expected)
        assert not any("test_good_citizen" in name or "transformers" in name for name in sys.modules)
        print(small[0] if hasattr(small, "__getitem__") else small.get_submodule("0"))
    """
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("Private(")


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_saved_model_gives_the_same_class_of_output(bert: nn.Module, how: str) -> None:
    given, file = ids(), io.BytesIO()
    if how == "pickle":
        file.write(pickle.dumps(bert))
        loaded = pickle.loads(file.getvalue())
    else:
        torch.save(bert, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    expected = bert(given)
    assert type(expected).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions"
    assert_same(loaded(given), expected)
    assert loaded(given).pooler_output is not None
    assert str(fxreuse.describe(loaded)) == str(fxreuse.describe(bert))
    assert repr(loaded) == repr(bert)
    with pytest.raises(fxreuse.InputError, match="attention_mask"):
        loaded(given, torch.ones(2, 7))


def test_hooks_of_a_library_survive_pickling(small: nn.Module) -> None:
    small.layers[1].register_forward_hook(_twice)
    given = x()
    assert torch.equal(pickle.loads(pickle.dumps(small))(given), small(given))


def _twice(module: nn.Module, args: Any, result: torch.Tensor) -> torch.Tensor:
    return 2 * result


def test_state_dict_goes_round(small: nn.Module) -> None:
    given = x()
    state = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    expected = small(given)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1)
    assert not torch.equal(small(given), expected)
    small.load_state_dict(state, strict=True)
    assert torch.equal(small(given), expected)
    name = "layers.1.linear1.weight"
    with pytest.raises(RuntimeError, match=name):
        small.load_state_dict({key: value for key, value in state.items() if key != name}, strict=True)
    with pytest.raises(RuntimeError, match="surplus"):
        small.load_state_dict({**state, "surplus": torch.zeros(1)}, strict=True)


def test_moves_to_the_meta_device(small: nn.Module) -> None:
    moved = small.to("meta")
    assert {tensor.device.type for tensor in moved.state_dict().values()} == {"meta"}
    result = moved(x(3, 7).to("meta"))
    assert (result.device.type, result.shape) == ("meta", (3, 7, 16))


def test_moves_to_double(small: nn.Module) -> None:
    given = x()
    expected = small(given)
    found = small.double()(given.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected)
    assert not torch.equal(found, expected.double())


def test_is_called_with_other_parameters(small: nn.Module) -> None:
    given = x()
    doubled = {name: 2 * tensor for name, tensor in small.state_dict().items()}
    expected, found = small(given), torch.func.functional_call(small, doubled, (given,))
    assert not torch.allclose(found, expected)
    assert torch.equal(small(given), expected)
    small.load_state_dict(doubled)
    torch.testing.assert_close(small(given), found)


def test_per_sample_gradients(small: nn.Module) -> None:
    """`torch.func` sees through the graph: gradients sample by sample add up to those of the batch."""
    small, given = small.double(), x(3, 5).double()
    weights = {name: p.detach() for name, p in small.named_parameters()}

    def loss(weights: dict[str, torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(small, weights, (batch,)).square().sum()

    expected = torch.func.grad(loss)(weights, given)
    single = [torch.func.grad(loss)(weights, part.repeat(2, 1, 1)) for part in given[:, None]]
    for name, gradient in expected.items():
        torch.testing.assert_close(sum(part[name] for part in single) / 2, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_layer_by_layer(small: nn.Module, reentrant: bool) -> None:
    """In training mode, so that dropout has to be drawn again as it was."""
    small, given = small.double(), x().double().requires_grad_()
    expected, expected_gradients = seeded_step(small, lambda: call(small, (given,)))
    runs = []
    for layer in small.layers:
        layer.forward = _checkpointed(layer, layer.forward, reentrant, runs)
    found, found_gradients = seeded_step(small, lambda: call(small, (given,)))
    assert len(runs) == 6  # every layer ran twice
    assert_same(found, expected)
    assert_same_gradients(found_gradients, expected_gradients, 1e-12)


def _checkpointed(layer: nn.Module, forward: Any, reentrant: bool, runs: list[nn.Module]) -> Any:
    def run(*args: Any) -> Any:
        runs.append(layer)
        return forward(*args)

    return lambda *args: checkpoint(run, *args, use_reentrant=reentrant)


def test_compiles_to_two_graphs(small: nn.Module) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(small, backend=counter, fullgraph=True)
    for sizes in ((2, 5), (3, 7), (4, 4), (2, 9)):
        given = x(*sizes)
        torch.testing.assert_close(compiled(given), small(given))
    torch._dynamo.reset()
    assert 1 <= counter.frame_count <= 2


def test_can_be_exported_again(small: nn.Module) -> None:
    sizes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    program = torch.export.export(small, (x(),), dynamic_shapes=sizes)
    assert set(program.state_dict) == set(small.state_dict())
    for given in (x(2, 5), x(3, 9)):
        assert torch.equal(program.module()(given), small(given))


def test_can_be_rewritten_again(made: nn.Module) -> None:
    """A second capture finds the sites that still compute a map of their own."""
    given = x()
    again = fxreuse.apply(made, "1x*", given)
    assert torch.equal(again(given), made(given))
    assert again.state_dict().keys() == made.state_dict().keys()
    assert [p is q for p, q in zip(again.parameters(), made.parameters(), strict=True)] == [True] * len(
        list(made.parameters())
    )


def test_leaders_can_be_grouped_once_more() -> None:
    (model, program), given = captured(), x()
    pairs = apply_captured(model, program, "2x* lowering=materialize")
    twice = fxreuse.apply(pairs, "2x1 lowering=materialize", given)
    once = apply_captured(model, program, "3x1 lowering=materialize")
    torch.testing.assert_close(twice(given), once(given))
    assert {n: p.shape for n, p in twice.named_parameters()} == {n: p.shape for n, p in once.named_parameters()}
    assert not torch.allclose(once(given), model(given))


def test_copy_gives_parameters_of_its_own() -> None:
    model, given = encoder(1), x()
    program = load_program(model, given)
    own = apply_captured(model, program, "1x*", copy=True)
    shared = apply_captured(model, program, "1x*")
    assert not pointers(own) & pointers(model)
    assert pointers(shared) == pointers(model)
    with torch.no_grad():
        model.layers[0].linear1.weight.zero_()
    assert torch.equal(shared(given), model(given))
    assert not torch.allclose(own(given), model(given))


def test_gradients_with_respect_to_inputs(small: nn.Module) -> None:
    given = x(2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(small.double(), (given,), fast_mode=True)


@pytest.mark.parametrize(("kind", "lr"), [(torch.optim.AdamW, 1e-2), (torch.optim.SGD, 0.3)])
def test_trains(small: nn.Module, kind: type, lr: float) -> None:
    given, wanted = x(4, 6), torch.randn(4, 6, 16)
    optimizer, losses = kind(small.train().parameters(), lr=lr), []
    for _ in range(12):
        loss = (small(given) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


def test_freezing_and_gradients_by_name(small: nn.Module) -> None:
    small.layers[0].requires_grad_(False)
    found = gradients(small, small(x()))
    assert {name for name, g in found.items() if g is None} == {name for name in found if name.startswith("layers.0.")}
