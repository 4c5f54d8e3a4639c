"""Masks that do nothing are gone, causal ones are the kernel's own, all others are as they were; outputs are equal."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import fx

from fxreuse.frontend.capture import caches_off, capture
from fxreuse.frontend.load import load_program
from fxreuse.nodes import argument, is_call
from fxreuse.passes.simplify_masks import simplify_masks
from fxreuse.program import Program

from .architectures import randomise
from .captures import captured
from .handwritten import export
from .running import named_tensors

aten = torch.ops.aten
TINY = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**TINY, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 8192, "sliding_window": 4096}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}


def attentions(program: Program) -> Counter[str]:
    """How many fused attentions there are of each kind of mask."""
    found: Counter[str] = Counter()
    for node in program.graph.nodes:
        if is_call(node, aten.scaled_dot_product_attention.default):
            masked = argument(node, 3, "attn_mask") is not None
            found["mask" if masked else "causal" if argument(node, 5, "is_causal", False) else "none"] += 1
    return found


def assert_equal_outputs(model: torch.nn.Module, program: Program, inputs: dict[str, torch.Tensor]) -> None:
    """In double precision, where rounding cannot hide a difference."""
    model, module = copy.deepcopy(model).double(), copy.deepcopy(program.module).double()
    with torch.no_grad(), caches_off(model):
        expected = list(named_tensors(model(**inputs)).values())
        found = list(named_tensors(module(*inputs.values())).values())
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


TEXT = {"bert": "bert_dense", "gpt2": "gpt2_dense", "llama": "llama_dense", "t5": "t5_encoder_dense"}
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "mistral": lambda: hf.MistralModel(hf.MistralConfig(**GROUPED)),
    "gemma3": lambda: hf.Gemma3TextModel(
        hf.Gemma3TextConfig(**GROUPED, layer_types=["sliding_attention", "full_attention"])
    ),
    "modernbert": lambda: hf.ModernBertModel(hf.ModernBertConfig(**TINY, **ENDS, global_attn_every_n_layers=2)),
}
EXPECTED = {
    "bert": {"none": 4},
    "gpt2": {"causal": 4},
    "llama": {"causal": 4},
    "t5": {"mask": 4},
    "mistral": {"mask": 2},
    "gemma3": {"mask": 1, "causal": 1},
    "modernbert": {"none": 1, "mask": 1},
}


def loaded(name: str) -> tuple[torch.nn.Module, Program]:
    if name in TEXT:
        found = captured(TEXT[name])
        return found.model, found.program
    model = randomise(MODELS[name]())
    return model, load_program(model, {"input_ids": torch.randint(3, 99, (2, 11))})


@pytest.mark.parametrize("name", EXPECTED)
def test_hugging_face_without_padding(name: str) -> None:
    model, program = loaded(name)
    program.check()
    assert attentions(program) == EXPECTED[name]
    assert_equal_outputs(model, program, {"input_ids": torch.randint(3, 99, (3, 14))})


def test_encoder_and_decoder() -> None:
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = randomise(hf.BartModel(hf.BartConfig(vocab_size=99, d_model=32, **sizes, **heads)))
    inputs = {"input_ids": torch.randint(3, 99, (2, 11)), "decoder_input_ids": torch.randint(3, 99, (2, 7))}
    program = load_program(model, inputs)
    assert attentions(program) == {"none": 2, "causal": 1}
    assert_equal_outputs(model, program, {name: ids[:, :5] for name, ids in inputs.items()})


@pytest.mark.parametrize("name", ["bert_padded", "gpt2_padded"])
def test_a_padding_mask_stays(name: str) -> None:
    program = captured(name).program
    assert attentions(program) == {"mask": 4}
    assert not [note for note in program.notes if note.kind == "mask"]


def test_a_bias_is_not_broadcast_over_the_batch() -> None:
    _, program = loaded("t5")
    sdpa = aten.scaled_dot_product_attention.default
    biases = {argument(node, 3, "attn_mask") for node in program.graph.find_nodes(op="call_function", target=sdpa)}
    assert len(biases) == 1
    assert biases.pop().meta["val"].shape[0] == 1


def test_one_note_for_each_kind() -> None:
    _, program = loaded("gpt2")
    (note,) = [note for note in program.notes if note.kind == "mask"]
    assert str(note) == "h.0.attn: attention mask proved causal and replaced by is_causal (4 times, here first)"


class Head(torch.nn.Module):
    """One attention head whose scores or mask a test writes."""

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.project = torch.nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.project(x).chunk(3, -1)
        return self.attend(query, key, value, torch.arange(x.shape[1]))


def simplified(attend: Callable[..., torch.Tensor]) -> tuple[Program, Program]:
    """The captured program and the simplified one, after a check that they are equal."""
    before = capture(export(Head(attend).double(), torch.randn(2, 5, 8, dtype=torch.float64)))
    after = simplify_masks(before)
    after.check()
    for length in (1, 5, 9):
        x = torch.randn(3, length, 8, dtype=torch.float64)
        for ours, theirs in zip(after.module(x), before.module(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    return before, after


def operators(program: Program) -> Counter[Any]:
    return Counter(node.target.overloadpacket for node in program.graph.nodes if hasattr(node.target, "overloadpacket"))


def scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query @ key.mT


UNFUSED = {
    "where": lambda s, i: torch.where((i >= 0)[None, None, :], s, -torch.inf),
    "where not": lambda s, i: torch.where((i < 0)[None, None, :], -torch.inf, s),
    "masked_fill": lambda s, i: s.masked_fill((i < 0)[None, :].expand_as(s[0]), -torch.inf),
    "add": lambda s, i: s + torch.where((i >= 0)[None, None, :], 0.0, -torch.inf).to(s.dtype),
    "add to a mask": lambda s, i: torch.zeros(i.shape[0], i.shape[0], dtype=s.dtype) + s,
}


@pytest.mark.parametrize("name", UNFUSED)
def test_unfused_scores_lose_a_mask_that_does_nothing(name: str) -> None:
    _, after = simplified(lambda q, k, v, i: UNFUSED[name](scores(q, k), i).softmax(-1) @ v)
    left = operators(after)
    assert not any(left[op] for op in (aten.where, aten.masked_fill, aten.add, aten.arange))
    assert [note.kind for note in after.notes if note.kind == "mask"] == ["mask"]


KEPT = {
    "causal": lambda s, i: s.masked_fill(i[None, :] > i[:, None], -torch.inf),
    "strict": lambda s, i: torch.where(i[None, :] < i[:, None], s, LOW),
    "data": lambda s, i: torch.where(s > 0, s, LOW),
    "larger result": lambda s, i: torch.where((i >= 0)[None, :, None], s[:, :1], LOW),
    "other type": lambda s, i: torch.where((i >= 0)[None, :, None], s.float(), s).double(),
    "finite low": lambda s, i: s + torch.where(i[None, :] <= i[:, None], 0.0, -100.0).to(s.dtype),
}
LOW = -1e30


@pytest.mark.parametrize("name", KEPT)
def test_unfused_scores_keep_every_other_mask(name: str) -> None:
    before, after = simplified(lambda q, k, v, i: KEPT[name](scores(q, k), i).softmax(-1) @ v)
    assert operators(after)[aten.where] + operators(after)[aten.masked_fill] == 1
    assert not after.notes[len(before.notes) :]


def fused(make_mask: Callable[[torch.Tensor], torch.Tensor], **options: Any) -> Callable[..., torch.Tensor]:
    return lambda q, k, v, i: F.scaled_dot_product_attention(q, k, v, attn_mask=make_mask(i), **options)


FUSED = {
    "all": (lambda i: (i >= 0)[None, :].expand(i.shape[0], -1), "none"),
    "one row": (lambda i: (i >= 0)[None, :], "none"),
    "zeros": (lambda i: torch.zeros(i.shape[0], i.shape[0], dtype=torch.float64), "none"),
    "causal": (lambda i: i[None, :] <= i[:, None], "causal"),
    "causal to add": (
        lambda i: torch.full((i.shape[0], i.shape[0]), -torch.inf, dtype=torch.float64).triu(1),
        "causal",
    ),
    "strict": (lambda i: (i[None, :] < i[:, None]) | (i[:, None] == 0), "mask"),
    "one more": (lambda i: i[None, :] <= i[:, None] + 1, "mask"),
    "reversed": (lambda i: i[None, :] >= i[:, None], "mask"),
    "window": (lambda i: (i[None, :] <= i[:, None]) & (i[:, None] - i[None, :] < 4096), "mask"),
    "first key": (lambda i: i[None, :] <= 0, "mask"),
    "low to add": (lambda i: torch.where(i[None, :] <= i[:, None], 0.0, -100.0).double(), "mask"),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_attention(name: str) -> None:
    make_mask, expected = FUSED[name]
    _, after = simplified(fused(make_mask, scale=0.3))
    assert attentions(after) == {expected: 1}
    (node,) = after.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert argument(node, 6, "scale") == 0.3
    if expected != "mask":
        assert not operators(after)[aten.arange]


def test_a_causal_mask_is_aligned_at_the_top_left() -> None:
    def cross(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        k, v = torch.cat([k, k], 1), torch.cat([v, v], 1)
        keys = torch.arange(k.shape[1])
        top_left = F.scaled_dot_product_attention(q, k, v, keys[None, :] <= i[:, None])
        bottom_right = F.scaled_dot_product_attention(q, k, v, keys[None, :] <= i[:, None] + i.shape[0])
        return top_left + bottom_right

    assert attentions(simplified(cross)[1]) == {"causal": 1, "mask": 1}


def test_a_mask_that_makes_the_result_larger_stays() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        visible = (i >= 0)[None, None, None, :].expand(q.shape[0], 3, i.shape[0], -1)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], visible)

    program = capture(export(Head(attend), torch.randn(2, 5, 8)))
    assert attentions(simplify_masks(program)) == {"mask": 1}


def test_scores_that_are_written_to_are_not_handed_out_twice() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        plain = scores(q, k)
        masked = torch.where((i >= 0)[None, None, :], plain, -torch.inf)
        masked.mul_(2.0)
        return (masked.softmax(-1) + plain.softmax(-1)) @ v

    _, after = simplified(attend)
    assert operators(after)[aten.where] == 1


def test_the_program_given_is_not_changed() -> None:
    before, after = simplified(fused(FUSED["causal"][0]))
    assert attentions(before) == {"mask": 1}
    assert attentions(after) == {"causal": 1}
    assert isinstance(before.graph, fx.Graph)
