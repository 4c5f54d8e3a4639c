from __future__ import annotations

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from fxreuse.frontend.mode_modules import marked, mode_modules, reads_training

MARK = torch.ops.fxreuse.mode_module.default


class DropPath(nn.Module):
    """As in the image models of several libraries."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.p = p

    def forward(self, x):
        if self.p == 0.0 or not self.training:
            return x
        keep = 1 - self.p
        return x * torch.rand(x.shape[0], *[1] * (x.ndim - 1)).add(keep).floor() / keep


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class ScaledInEval(nn.Module):
    def forward(self, x):
        return x if self.training else x * 0.5


class DroppedSoftmax(nn.Module):
    def forward(self, scores):
        return F.dropout(scores.softmax(-1), 0.1, self.training)


class WholeAttention(nn.Module):
    """An attention without children: it takes one tensor, gives one of that shape, and must stay visible."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        scores = x @ self.weight @ x.mT
        return F.dropout(torch.softmax(scores, -1), 0.1, self.training) @ x


class TwoArguments(nn.Module):
    def forward(self, x, residual):
        return residual + (torch.zeros_like(x) if self.training else x)


class Halved(nn.Module):
    def forward(self, x):
        return x[..., ::2] if not self.training else x


def through_helper(module, x):
    return x.softmax(-1)


class HelpedSoftmax(nn.Module):
    def forward(self, x):
        return F.dropout(through_helper(self, x), 0.1, self.training)


def marks(program) -> list[str]:
    return [node.args[1] for node in program.graph.nodes if node.target is MARK]


def export(model, *args, strict=False):
    model.eval()
    with marked(model) as modules, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, args, strict=strict)
    return program, modules


def test_what_counts():
    model = nn.ModuleDict({
        "dropout": nn.Dropout(0.1), "alpha": nn.AlphaDropout(0.1), "spatial": nn.Dropout2d(0.1),
        "batch": nn.BatchNorm1d(4), "sync": nn.SyncBatchNorm(4), "path": DropPath(), "noise": Noise(),
        "scaled": ScaledInEval(), "tracking": nn.InstanceNorm1d(4, track_running_stats=True),
        "linear": nn.Linear(4, 4), "instance": nn.InstanceNorm1d(4), "layer": nn.LayerNorm(4), "gelu": nn.GELU(),
        "attention": nn.MultiheadAttention(4, 2, dropout=0.1), "block": nn.TransformerEncoderLayer(4, 2, 8),
    })  # fmt: skip
    inside_block = {"block.dropout", "block.dropout1", "block.dropout2"}
    expected = {"dropout", "alpha", "spatial", "batch", "sync", "path", "noise", "scaled", "tracking"}
    assert set(mode_modules(model)) == expected | inside_block


def test_library_classes_count_by_what_they_do():
    config = hf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4)
    kinds = {type(module).__name__ for module in mode_modules(hf.SwinModel(config)).values()}
    assert kinds == {"Dropout", "SwinDropPath"}


@pytest.mark.parametrize("strict", [False, True])
def test_marks_and_what_runs_its_own_code(strict):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout, self.path, self.norm = nn.Dropout(0.1, inplace=True), DropPath(), nn.BatchNorm1d(3)
            self.softmax, self.attention, self.two = DroppedSoftmax(), WholeAttention(), TwoArguments()
            self.scaled = ScaledInEval()
            self.again = self.dropout

        def forward(self, x):
            y = self.two(self.attention(self.softmax(self.norm(self.path(self.dropout(x * 1))))), x)
            return self.again(self.scaled(y))

    program, _ = export(Model(), torch.randn(2, 3, 8), strict=strict)
    assert marks(program) == ["dropout", "path", "norm", "scaled", "dropout"]
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("softmax" in name for name in operators) == 2
    assert not any("batch_norm" in name or "rand" in name for name in operators)


def test_what_runs_its_own_code_leaves_the_dictionary():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout, self.two, self.halved, self.helped = nn.Dropout(), TwoArguments(), Halved(), HelpedSoftmax()

        def forward(self, x):
            return self.halved(self.helped(self.two(self.dropout(x), x)))

    program, modules = export(Model(), torch.randn(2, 8))
    assert marks(program) == ["dropout"]
    assert list(modules) == ["dropout"]


def test_sizes_stay_free():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), DropPath()).eval()
    with marked(model):
        program = torch.export.export(model, (torch.randn(3, 5, 4),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    values = [node.meta["val"] for node in program.graph.nodes if node.target is MARK]
    assert all(isinstance(value.shape[0], torch.SymInt) and value.shape[1:] == (5, 4) for value in values)


def test_by_itself_the_operator_is_the_identity():
    x = torch.randn(3, 4).t()
    assert torch.equal(torch.ops.fxreuse.mode_module(x, "a"), x)
    torch.library.opcheck(MARK, (x, "a"), test_utils=("test_schema", "test_faketensor"))


def test_everything_is_put_back():
    def own(x):
        return x

    model = nn.Sequential(nn.Dropout(), nn.Sequential(DropPath()), nn.Dropout())
    model[2].forward = own
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(TypeError), marked(model):
        model(torch.randn(2), "an argument too many")
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert model[2].forward is own


def test_training_is_found_behind_decorators_and_in_bases():
    def decorate(function):
        @functools.wraps(function)
        def wrapped(*args):
            return function(*args)

        return wrapped

    def decorate_carelessly(function):
        return lambda *args: function(*args)

    class Decorated(nn.Module):
        @decorate
        def forward(self, x):
            return x if self.training else -x

    class Carelessly(nn.Module):
        @decorate_carelessly
        def forward(self, x):
            return x if self.training else -x

    class Nested(nn.Module):
        def forward(self, x):
            return [y for y in x if self.training]

    class Derived(DropPath):
        pass

    class InProperty(nn.Module):
        @property
        def mode(self):
            return self.training

    assert all(map(reads_training, (Decorated, Carelessly, Nested, Derived, InProperty)))
    assert not any(map(reads_training, (nn.Module, nn.Linear, nn.LayerNorm, nn.Sequential)))
