"""Every form of `recognised_forms` is found, with its heads, masks and biases."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import pytest
import torch
from torch.export import Dim

from fxreuse.attention import AttentionSites
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program
from fxreuse.program import Program

from . import recognised_forms as forms

# heads, key heads, width, value width, fused, mask, bias
Expected = tuple[int, int, int, int, bool, str, str]
PLAIN: Expected = (2, 2, 4, 4, False, "none", "none")
FUSED: Expected = (2, 2, 4, 4, True, "none", "none")


def plain(mask: str = "none", bias: str = "none") -> Expected:
    return (*PLAIN[:5], mask, bias)


FREE_SIZES: Mapping[forms.Function, list[Expected]] = {
    forms.thirds: [PLAIN],
    forms.interleaved: [PLAIN],
    forms.unbound: [FUSED],
    forms.batched_heads: [PLAIN],
    forms.scaled_by_baddbmm: [plain(bias="parameters")],
    forms.relative_shift: [plain(bias="token-dependent position")],
    forms.sums: [PLAIN],
    forms.mixed_before_by_linear: [plain("causal", "mixed heads")],
    forms.exponentials_masked: [plain("causal")],
    forms.sink: [plain(bias="sink")],
    forms.suppressed: [plain("suppressed")],
    forms.chunked: [(*FUSED[:5], "fixed", "none")],
    forms.sliding: [(*FUSED[:5], "causal+window", "none")],
}

FIXED_SIZES: Mapping[forms.Function, list[Expected]] = {
    forms.interleaved_channels: [PLAIN],
    forms.stacked_first: [PLAIN],
    forms.einops_style: [PLAIN],
    forms.einsum_of_one: [PLAIN],
    forms.einsum_of_three: [PLAIN],
    forms.tensordot: [(1, 1, 8, 8, False, "none", "none")],
    forms.inner: [(1, 1, 8, 8, False, "none", "none")],
    forms.one_key_head: [(2, 1, 4, 12, False, "none", "none")],
    forms.wide_values: [(2, 2, 4, 6, False, "none", "none")],
    forms.normed: [PLAIN],
    forms.normed_by_hand: [PLAIN],
    forms.rotary_halves: [PLAIN],
    forms.rotary_pairs: [PLAIN],
    forms.rotary_strided: [PLAIN],
    forms.sums_of_one_key_head: [(2, 1, 4, 12, False, "none", "none")],
    forms.scaled_inside: [PLAIN],
    forms.scaled_by_parameter: [PLAIN],
    forms.soft_capped: [PLAIN],
    forms.disentangled: [plain(bias="token-dependent position")],
    forms.mixed_before: [plain(bias="mixed heads")],
    forms.mixed_before_by_convolution: [plain(bias="parameters + mixed heads")],
    forms.exponentials: [PLAIN],
    forms.exponentials_less_maximum: [PLAIN],
    forms.exponentials_times_mask: [plain("causal")],
    forms.exponential_of_log_softmax: [PLAIN],
    forms.exponential_less_logsumexp: [PLAIN],
    forms.softmax_plus_one: [PLAIN],
    forms.normalised_by_f_normalize: [PLAIN],
    forms.cast: [PLAIN],
    forms.first_axis: [PLAIN],
    forms.inner_axis: [PLAIN],
    forms.three_consumers: [PLAIN],
    forms.biased_table: [(*FUSED[:5], "none", "relative position")],
    forms.alibi: [plain("fixed")],
    forms.both_masks: [plain("causal"), (*FUSED[:5], "causal", "none")],
}

EXPECTED = {**FREE_SIZES, **FIXED_SIZES}
OF_ONE_SEQUENCE = {forms.tensordot, forms.inner}
CONSUMERS = {forms.three_consumers: 3}


@functools.cache
def found(free: bool) -> tuple[Program, AttentionSites]:
    model = forms.Forms(list(FREE_SIZES if free else FIXED_SIZES)).eval()
    sizes = {"x": {0: Dim.AUTO, 1: Dim.AUTO} if free else None}
    with torch.no_grad():
        program = load_program(torch.export.export(model, (torch.randn(3, 5, 8),), dynamic_shapes=sizes))
    return program, find(program)


@pytest.mark.parametrize("form", EXPECTED, ids=lambda form: form.__name__)
def test_attention_in_any_form(form: forms.Function) -> None:
    program, sites = found(form in FREE_SIZES)
    own = [site for site in sites if site.path == f"forms.{form.__name__}"]
    shown = [(s.heads, s.kv_heads, s.head_dim, s.value_dim, s.fused, s.mask, s.bias) for s in own]
    assert shown == EXPECTED[form]
    (x,) = program.graph.find_nodes(op="placeholder")
    batch, tokens = (getattr(size, "node", size) for size in x.meta["val"].shape[:2])
    batch, tokens = (getattr(size, "expr", size) for size in (batch, tokens))
    for site in own:
        assert site.kind == "self"
        keys = tokens + 1 if form is forms.sink else tokens
        assert site.map_shape == (1 if form in OF_ONE_SEQUENCE else batch, site.heads, tokens, keys)
        assert len(site.nodes.contexts) == CONSUMERS.get(form, 1)


@pytest.mark.parametrize("free", [True, False])
def test_nothing_else_is_found_and_nothing_rejected(free: bool) -> None:
    _, sites = found(free)
    assert {site.path for site in sites} == {f"forms.{f.__name__}" for f in (FREE_SIZES if free else FIXED_SIZES)}
    assert sites.rejected == ()


def test_the_map_is_what_meets_the_values() -> None:
    """After suppression and renormalisation, before dropout."""
    program, sites = found(True)
    (site,) = [site for site in sites if site.path == "forms.suppressed"]
    shared, scores = (program.node(str(name)) for name in (site.nodes.map, site.nodes.scores))
    assert shared.target is torch.ops.aten.div.Tensor
    assert [user.target for user in shared.users] != [torch.ops.aten.softmax.int]
    assert [user.target for user in scores.users] == [torch.ops.aten.softmax.int]
