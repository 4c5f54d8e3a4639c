"""`fxreuse inspect`: what a person reads off a model, for a few layers and for many, as text and as data."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxreuse.attention import Rejected
from fxreuse.reports.inspection import InspectedSite, InspectedStack, Inspection, inspect_model

HEADS, WIDTH = 2, 8


class Fused(nn.Module):
    """Queries, keys and values of one weight, in thirds or interleaved per head; a window on every other layer."""

    def __init__(self, interleaved: bool, window: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.interleaved, self.window = interleaved, window

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if self.interleaved:
            q, k, v = self.qkv(x).view(batch, length, HEADS, -1).transpose(1, 2).chunk(3, -1)
        else:
            q, k, v = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        places = torch.arange(length, device=x.device)
        near = (places[:, None] - places).abs() < (3 if self.window else 9)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
        return x + self.out(y.transpose(1, 2).reshape(batch, length, WIDTH))


class Routed(nn.Module):
    """Experts that are mixed by a softmax, after an attention whose queries and keys have weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.route = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, HEADS, -1).transpose(1, 2)
        k, v = (part.view(batch, length, 1, -1).transpose(1, 2) for part in self.kv(x).chunk(2, -1))
        x = x + ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(batch, length, WIDTH)
        weights = self.route(x).softmax(-1)
        return x * weights[..., :1] + x.relu() * weights[..., 1:]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.local = nn.ModuleList(Fused(interleaved=False, window=i % 2 == 0) for i in range(4))
        self.merged = nn.ModuleList(Fused(interleaved=True, window=False) for _ in range(2))
        self.routed = nn.ModuleList(Routed() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.local, *self.merged, *self.routed):
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def found() -> Inspection:
    return inspect_model(Model(), torch.randn(2, 7, WIDTH))


def lines(text: str) -> list[str]:
    """The lines of a report with single spaces."""
    return [re.sub(r" +", " ", line).strip() for line in text.splitlines()]


def test_the_report_says_what_there_is(found: Inspection) -> None:
    text = lines(str(found))
    for expected in (
        "Model: 8 attentions in 3 stacks, 2 softmaxes that are none",
        "x float32 2×7×8 0 (B), 1 (T) 2 = 8",
        "B = x.shape[0]",
        "T = x.shape[1]",
        "stack local.{i}·self: 4 layers",
        "0,2 local.{0,2} 2 4 B×2×T×T fused window none qkv fused, thirds",
        "1,3 local.{1,3} 2 4 B×2×T×T fused window none qkv fused, thirds",
        "queries local.{i}.qkv.weight",
        "output local.{i}.out.weight",
        "0,1 merged.{0,1} 2 4 B×2×T×T fused window none qkv fused, interleaved per head",
        "0,1 routed.{0,1} 2/1 4 B×2×T×T softmax none none kv fused, halves; q apart",
    ):
        assert expected in text, str(found)


def test_the_report_says_which_plans_to_try(found: Inspection) -> None:
    text = lines(str(found))
    assert "sharing only within 0,2 (mask window) | 1,3 (mask window)" in text
    assert "plans leaders=0,1,0,1" in text
    assert any(line.startswith("not 2x2, 4x1, 2x*: local.1 (layer 1) cannot use the map of local.0") for line in text)
    assert text.count("sharing any of these layers can share a map: one shape, one mask") == 2
    assert text.count("plans 2x1 2x*") == 2


def test_what_is_no_attention_is_said_once_with_its_line(found: Inspection) -> None:
    text = str(found)
    assert text.count("routed.{0,1} (2 times): ") == 1
    assert re.findall(r"test_inspect\.py:\d+: weights = self\.route\(x\)\.softmax\(-1\)", text) != []
    assert text.count("weights = self.route(x)") == 1
    every = found.report(every=True)
    assert every.count("weights = self.route(x).softmax(-1)") == 2
    assert "local.3 " in every
    assert "{0,2}" not in every


def test_json_has_every_attention(found: Inspection) -> None:
    data = json.loads(found.to_json())
    local = data["stacks"][0]
    assert [site["site"] for site in local["attentions"]] == [f"local.{i}" for i in range(4)]
    assert local["can_share"] == [[0, 2], [1, 3]]
    assert {trial["plan"] for trial in local["plans"] if not trial["refused"]} == {"leaders=0,1,0,1"}
    assert local["attentions"][0]["layout"]["weights"]["values"] == "local.0.qkv.weight"
    assert data["inputs"][0]["free"] == {"0": "B", "1": "T"}
    assert data["inputs"][0]["fixed"] == {"2": WIDTH}
    assert [rejected["path"] for rejected in data["not_attention"]] == ["routed.0", "routed.1"]
    assert set(data["seconds"]) == {"capture", "find", "layouts", "plans"}


def replicated(found: Inspection, layers: int) -> Inspection:
    """The same report for a model of so many layers, whose first stack has another mask at every sixth."""
    first = found.stacks[0].sites[0]

    def site(layer: int) -> InspectedSite:
        weights = {name: path.replace("0", str(layer)) for name, path in first.layout.weights.items()}
        layout = dataclasses.replace(first.layout, weights=weights)
        mask = "causal" if layer % 6 == 5 else "window"
        made = dataclasses.replace(first.site, path=f"local.{layer}", layer=layer, mask=mask)
        return dataclasses.replace(first, site=made, group=int(mask == "causal"), layout=layout)

    rejected = [Rejected(f"routed.{i}", "softmax", "a router", "model.py:3: softmax") for i in range(layers)]
    stack = InspectedStack("local.{i}·self", tuple(map(site, range(layers))), ())
    return dataclasses.replace(found, stacks=(stack,), rejected=tuple(rejected))


def test_many_layers_take_as_few_lines(found: Inspection) -> None:
    few, many = replicated(found, 12), replicated(found, 48)
    assert len(str(many).splitlines()) == len(str(few).splitlines()) < 35
    text = lines(str(many))
    assert any(line.startswith("0…4,6…10,…,42…46 local.{0…4,6…10,…,42…46} 2 4") for line in text)
    assert any(line.startswith("5,11,…,47 local.{5,11,…,47} 2 4") for line in text)
    assert "values local.{i}.qkv.weight" in text
    assert any(line.startswith("routed.{0…47} (48 times): a router") for line in text)
    assert sum(line.startswith("local.", 4) for line in many.report(every=True).splitlines()) == 0
    assert len(many.report(every=True).splitlines()) > 130


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


def test_a_model_without_any_softmax() -> None:
    text = str(inspect_model(Pooled(), torch.randn(2, 7)))
    assert "Pooled: 0 attentions in 0 stacks" in text
    assert "its graph has no softmax and no fused attention" in text


class Rotated(nn.Module):
    """Queries that go through more than views on the way: their weight is known, its rows are not."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, HEADS, -1).transpose(1, 2).chunk(3, -1)
        angles = torch.arange(length, device=x.device, dtype=x.dtype)[:, None]
        q = q * angles.cos() + torch.cat([-q[..., 2:], q[..., :2]], -1) * angles.sin()
        y: Any = F.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).reshape(batch, length, WIDTH)


def test_weights_behind_a_rotary_embedding_are_named() -> None:
    found = inspect_model(Rotated(), torch.randn(2, 7, WIDTH))
    [inspected] = found.stacks[0].sites
    assert inspected.layout.text == "qkv fused, interleaved per head"
    assert inspected.layout.weights == dict.fromkeys(("queries", "keys", "values"), "qkv.weight")
    assert set(inspected.layout.unread) == {"queries", "output"}
    assert "which weight rows are its queries cannot be told" in " ".join(lines(str(found)))
