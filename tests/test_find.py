"""Every attention of public architectures is found, by data flow, with its heads, masks and biases."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

from fxreuse.attention import AttentionSites
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program
from fxreuse.program import Program, module_stack

from .architectures import ARCHITECTURES
from .captures import captured

_TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = {"vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _ids(length: int = 11) -> torch.Tensor:
    return torch.randint(3, 99, (2, length))


def gemma2() -> tuple[torch.nn.Module, Any]:
    config = hf.Gemma2Config(num_key_value_heads=2, head_dim=8, sliding_window=4, **_TEXT, **_TINY)
    return hf.Gemma2Model(config), {"input_ids": _ids()}


def modernbert() -> tuple[torch.nn.Module, Any]:
    special = {"cls_token_id": 1, "sep_token_id": 2}
    config = hf.ModernBertConfig(local_attention=6, global_attn_every_n_layers=3, **special, **_TEXT, **_TINY)
    return hf.ModernBertModel(config), {"input_ids": _ids()}


def albert() -> tuple[torch.nn.Module, Any]:
    return hf.AlbertModel(hf.AlbertConfig(embedding_size=16, **_TEXT, **_TINY)), {"input_ids": _ids()}


def gpt_neox() -> tuple[torch.nn.Module, Any]:
    return hf.GPTNeoXModel(hf.GPTNeoXConfig(**_TEXT, **_TINY)), {"input_ids": _ids()}


def gpt_neo() -> tuple[torch.nn.Module, Any]:
    kinds = [[["global", "local"], 2]]
    sizes = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "intermediate_size": 64, "window_size": 4}
    return hf.GPTNeoModel(hf.GPTNeoConfig(attention_types=kinds, **sizes, **_TEXT)), {"input_ids": _ids()}


MODELS: dict[str, Callable[[], tuple[torch.nn.Module, Any]]] = {
    model.__name__: model for model in (gemma2, modernbert, albert, gpt_neox, gpt_neo)
}


@functools.cache
def sites_of(name: str) -> tuple[Program, AttentionSites]:
    if name in ARCHITECTURES:
        program = captured(name).program
    else:
        model, inputs = MODELS[name]()
        program = load_program(model.eval(), inputs)
    return program, find(program)


def summary(sites: AttentionSites) -> list[tuple[str, int, str, str, str, str]]:
    """One line for every stack: how many layers, and what all of them have in common."""
    lines = []
    for stack, layers in sites.stacks.items():
        heads, *other = {f"{s.heads}/{s.kv_heads}×{s.head_dim}/{s.value_dim}" for s in layers}
        assert not other
        common = (" | ".join(dict.fromkeys(getattr(s, field) for s in layers)) for field in ("kind", "mask", "bias"))
        lines.append((stack, len(layers), heads, *common))
    return lines


PLAIN = ("4/4×8/8", "self", "none", "none")
PADDED = ("4/4×8/8", "self", "padding", "none")

EXPECTED = {
    "bert_padded": [("encoder.layer.{i}·self", 4, *PADDED)],
    "gpt2_padded": [("h.{i}·self", 4, "4/4×8/8", "self", "causal+padding", "none")],
    "llama_dense": [("model.layers.{i}·self", 4, "4/2×8/8", "self", "causal", "none")],
    "t5_encoder_padded": [("encoder.block.{i}·self", 4, "4/4×8/8", "self", "padding", "relative position")],
    "bart_encoder": [
        ("encoder.layers.{i}·self", 4, *PADDED),
        ("decoder.layers.{i}·self", 4, "4/4×8/8", "self", "causal", "none"),
        ("decoder.layers.{i}·cross", 4, "4/4×8/8", "cross", "padding", "none"),
    ],
    "vit": [("layers.{i}·self", 4, *PLAIN)],
    "swin": [
        ("encoder.layers.0.blocks.{i}·self", 2, "2/2×8/8", "self", "none | fixed", "learned table"),
        ("encoder.layers.1.blocks.{i}·self", 4, "4/4×8/8", "self", "none | fixed", "learned table"),
    ],
    "wavlm_padded": [("encoder.layers.{i}·self", 4, "4/4×8/8", "self", "padding", "gated relative position")],
    "conformer_relative": [("encoder.layers.{i}·self", 4, "4/4×8/8", "self", "none", "token-dependent position")],
    "conformer_rotary": [("encoder.layers.{i}·self", 4, *PLAIN)],
    "whisper_encoder": [("layers.{i}·self", 4, *PLAIN)],
    "torch_encoder_padded": [("layers.{i}·self", 4, *PADDED)],
    "gemma2": [("layers.{i}·self", 4, "4/2×8/8", "self", "causal+window | causal", "none")],
    "modernbert": [("layers.{i}·self", 4, "4/4×8/8", "self", "none | window", "none")],
    "albert": [("encoder.albert_layer_groups.0.albert_layers.0@{i}·self", 4, *PLAIN)],
    "gpt_neox": [("layers.{i}·self", 4, "4/4×8/8", "self", "causal", "none")],
    "gpt_neo": [("h.{i}·self", 4, "4/4×8/8", "self", "causal | causal+fixed", "none")],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_attention_of_an_architecture(name: str) -> None:
    _, sites = sites_of(name)
    assert summary(sites) == EXPECTED[name]
    assert sites.rejected == ()


@pytest.mark.parametrize("name", EXPECTED)
def test_the_nodes_of_a_site_are_in_the_graph_and_fit_together(name: str) -> None:
    program, sites = sites_of(name)
    known = {node.name: node for node in program.graph.nodes}
    for site in sites:
        nodes = site.nodes
        assert {nodes.map, nodes.query, nodes.key, *nodes.contexts, *nodes.values} <= known.keys()
        assert site.fused == (nodes.scores is None)
        assert len(nodes.contexts) == len(nodes.values) == 1
        assert site.layer_path in module_stack(known[nodes.map])
        batch, heads, queries, keys = site.map_shape
        if not site.fused:
            assert known[nodes.map].args[0].name == nodes.scores
            assert known[nodes.map].meta["val"].numel() == batch * heads * queries * keys


@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("gemma2", [0, 1, 0, 1]),
        ("modernbert", [0, 1, 1, 0]),
        ("swin", [0, 1, 0, 2, 0, 2]),
        ("gpt_neo", [0, 1, 0, 1]),
        ("bart_encoder", [0, 0, 0, 0, 1, 2, 1, 2, 1, 2, 1, 2]),
        ("llama_dense", [0, 0, 0, 0]),
        ("t5_encoder_padded", [0, 0, 0, 0]),
    ],
)
def test_masks_are_compared_by_their_values(name: str, masks: list[int]) -> None:
    numbers: dict[str, int] = {}
    assert [numbers.setdefault(site.mask_key, len(numbers)) for site in sites_of(name)[1]] == masks


def test_the_table_names_stack_mask_and_bias() -> None:
    text = str(sites_of("wavlm_padded")[1])
    assert "encoder.layers.{i}·self" in text
    assert "gated relative position" in text
