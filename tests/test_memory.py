"""Predicted peak memory against what the profiler measures, to the byte; and what counts and what does not."""

from __future__ import annotations

import pytest
import torch
from models.conformer import Conformer
from models.hubert_student import Layer
from torch.nn import functional

import fxreuse
from fxreuse.checking.measure import peak_memory
from fxreuse.cost_model.memory import peak_bytes
from fxreuse.map_workspace import attention_map

LENGTH = 300  # the maps of four heads take more than a MiB, so that they are in kept storage


def measured(model: torch.nn.Module, *inputs: torch.Tensor | None, training: bool = False) -> int:
    """The peak of one call."""

    def step() -> None:
        model(*inputs).sum().backward()
        model.zero_grad()

    with torch.set_grad_enabled(training):
        return peak_memory(step if training else lambda: model(*inputs))


class Layers(torch.nn.Sequential):
    """Attention and feed-forward layers, fused."""

    def __init__(self) -> None:
        super().__init__(*(Layer(32, 64, 4, 0.1) for _ in range(2)))


@pytest.fixture(scope="module", params=["relative", "fused", "materialize", "recompute"])
def model(request) -> torch.nn.Module:
    """Models as they are, with and without relative positions, and what the two lowerings make of the latter."""
    if request.param == "relative":
        return Conformer(32, layers=2, kernel=5).eval()
    if request.param == "fused":
        return Layers().eval()
    return fxreuse.apply(Layers().eval(), f"2x* lowering={request.param}", torch.randn(2, 5, 32))


class TestAgainstTheProfiler:
    @pytest.mark.parametrize("batch", [1, 2])
    def test_inference(self, model, batch):
        frames = torch.randn(batch, LENGTH, 32)
        assert peak_bytes(model, (frames,), {}) == pytest.approx(measured(model, frames), abs=64)

    def test_training(self, model):
        frames = torch.randn(2, 40, 32)
        model.train()
        expected = measured(model, frames, training=True)
        model.eval()
        assert peak_bytes(model, (frames,), {}, training=True) == pytest.approx(expected, rel=0.05)
        assert not model.training

    @pytest.mark.parametrize("length", [5, 200, 800])
    def test_fused_attention(self, length):
        layer = Layer(32, 64, 2, 0.0).eval()
        frames = torch.randn(2, length, 32)
        assert peak_bytes(layer, (frames,), {}) == measured(layer, frames)

    @pytest.mark.parametrize(
        ("batch", "channels", "result", "kernel", "groups", "length"),
        [
            (1, 64, 64, 3, 1, 500),  # blocks of channels, which the inputs outweigh
            (1, 64, 256, 3, 1, 500),  # the same, which the result outweighs
            (1, 64, 64, 5, 64, 500),  # a depthwise one
            (1, 1, 16, 10, 1, 30_000),  # a waveform, which stays as it is
            (1, 16, 32, 3, 1, 100),  # a small one, which is unfolded
            (1, 64, 32, 1, 1, 500),  # one tap
        ],
    )
    def test_convolutions(self, batch, channels, result, kernel, groups, length):
        convolution = torch.nn.Conv1d(channels, result, kernel, groups=groups)
        data = torch.randn(batch, channels, length)
        assert peak_bytes(convolution, (data,), {}) == pytest.approx(measured(convolution, data), rel=0.02)

    @pytest.mark.parametrize(
        ("channels", "result", "kernel", "groups", "size"),
        [(32, 32, 3, 32, 64), (32, 64, 1, 1, 32), (64, 64, 5, 64, 64), (32, 32, 7, 32, 8)],
    )
    def test_images_with_channels_last(self, channels, result, kernel, groups, size):
        """As those that are made of tokens, (batch, height · width, channels)."""
        convolution = torch.nn.Conv2d(channels, result, kernel, padding=kernel // 2, groups=groups)
        model = Steps(lambda x: x.transpose(1, 2).unflatten(2, (size, size)), convolution)
        data = torch.randn(2, size * size, channels)
        assert peak_bytes(model, (data,), {}) == pytest.approx(measured(model, data), rel=0.02)

    @pytest.mark.parametrize("length", [9, 300, 700])  # of three heads: unpooled; in kept storage; in two parts
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    @pytest.mark.parametrize(
        ("mask", "is_causal"),
        [(None, False), (None, True), ("keys", True), ("pairs", False), ("pairs", True), ("numbers", True)],
    )
    def test_a_stored_map(self, length, dtype, mask, is_causal):
        class Mapped(torch.nn.Module):
            def forward(self, query, key, mask):
                return attention_map(query, key, mask, is_causal, 0.3, dtype=dtype)

        masks = {
            None: None,
            "keys": torch.ones(2, 1, 1, length, dtype=torch.bool),
            "pairs": torch.ones(2, 1, length, length, dtype=torch.bool),
            "numbers": torch.zeros(1, 1, 1, length),
        }
        query, key = torch.randn(2, length, 3, 8).transpose(1, 2), torch.randn(2, 1, length, 8)
        given = query, key, masks[mask]
        assert peak_bytes(Mapped(), given, {}) == pytest.approx(measured(Mapped(), *given), rel=0.001, abs=64)

    @pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 2, 3, 1)])
    def test_a_linear_layer_on_any_layout(self, order):
        model = Steps(lambda x: x.permute(order), torch.nn.Linear(32, 64))
        data = torch.randn([(2, 3, 5, 32)[order.index(dim)] for dim in range(4)])
        assert peak_bytes(model, (data,), {}) == measured(model, data)

    def test_the_backward_of_fused_attention(self):
        attend = Steps(lambda x: functional.scaled_dot_product_attention(x, x, x).exp())
        data = torch.randn(1, 1, 300, 8, requires_grad=True)

        def step() -> None:
            attend(data).sum().backward()
            data.grad = None

        assert peak_bytes(attend, (data,), {}, training=True) == pytest.approx(peak_memory(step), rel=0.05)

    def test_branches_on_integers_that_follow_from_sizes(self):
        class Masked(torch.nn.Module):
            def forward(self, x):
                places = torch.arange(len(x))
                gaps = (places.diff() != 1).cumsum(0)
                return x.exp() if (gaps == 0).all() else x @ (places[:, None] * places).float()

        model, data = Masked(), torch.randn(200, 200)
        assert peak_bytes(model, (data,), {}) == pytest.approx(measured(model, data), rel=0.05)


class Steps(torch.nn.Module):
    """Applies functions one after the other."""

    def __init__(self, *steps):
        super().__init__()
        self.steps = steps

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


class TestWhatCounts:
    @pytest.mark.parametrize(
        ("steps", "tensors"),
        [
            ((), 0),
            ((torch.exp,), 1),
            ((torch.exp, torch.exp), 2),
            ((torch.exp, torch.exp, torch.exp), 2),
            ((torch.exp, torch.exp_), 1),
            ((torch.exp, lambda x: x.view(4, 25).t()), 1),
            ((lambda x: torch.cat([x, x]), lambda x: x[:10] + 1), 3),
        ],
    )
    def test_results_until_their_last_reference(self, steps, tensors):
        assert peak_bytes(Steps(*steps), (torch.ones(10, 10),), {}) == 400 * tensors

    def test_neither_weights_nor_constants_nor_inputs(self):
        constant = torch.ones(10, 10)
        model = Steps(torch.nn.Linear(10, 10), lambda x: functional.relu(x).add_(constant).add_(constant.t()))
        assert peak_bytes(model, (torch.ones(10, 10),), {}) == 800

    def test_gradients_of_parameters_in_training(self):
        model = torch.nn.Linear(100, 1)
        assert peak_bytes(model, (torch.ones(1, 100),), {}, training=True) >= 404

    def test_a_layer_that_layerdrop_may_skip_is_kept(self):
        class Skipping(torch.nn.Module):
            def forward(self, x):
                return x if self.training and torch.rand([]) < 0.9 else x.exp()

        assert peak_bytes(Skipping(), (torch.ones(10, requires_grad=True),), {}, training=True) >= 40

    def test_a_model_without_weights_in_memory(self):
        with torch.device("meta"):
            model = torch.nn.Sequential(torch.nn.Linear(8, 10**6), torch.nn.Linear(10**6, 8))
            x = torch.empty(2, 8)
        assert peak_bytes(model, (x,), {}) == 4 * (2 * 10**6 + 2 * 8)

    def test_an_operator_that_a_cpu_refuses(self):
        """As in a graph that was captured on the meta device, of a model that asks which one it is on."""
        model = Steps(torch.Tensor.int, lambda x: torch.histc(x, 50, 0, 49), torch.Tensor.float)
        assert peak_bytes(model, (torch.ones(10, 10),), {}) == 400 + 200
