"""What is no attention is not taken for one: every function of `not_attention` is rejected, with its reason."""

from __future__ import annotations

import functools

import pytest
import torch

from fxreuse.attention import AttentionSites
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program

from .handwritten import find_in
from .not_attention import REASONS
from .recognised_forms import Form, Forms, Function, Tensor


@functools.cache
def found() -> AttentionSites:
    model = Forms(list(REASONS)).eval()
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(3, 5, 8),))
    return find(load_program(exported))


@pytest.mark.parametrize("form", REASONS, ids=lambda form: form.__name__)
def test_a_softmax_that_is_no_attention(form: Function) -> None:
    rejected = [r for r in found().rejected if r.path == f"forms.{form.__name__}"]
    assert len(rejected) == len(REASONS[form])
    for shown, reason in zip(rejected, REASONS[form], strict=True):
        assert reason in shown.reason
        assert "recognised_forms.py" in shown.source


def test_nothing_is_taken_for_an_attention() -> None:
    assert len(found()) == 0


@torch.library.custom_op("fxreuse_tests::flash_attn_forward", mutates_args=())
def flash_attn_forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@flash_attn_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


def test_an_operator_that_is_called_an_attention_is_named() -> None:
    def foreign(m: Form, x: Tensor) -> Tensor:
        return flash_attn_forward(*m.heads_of(x))

    _, sites = find_in(Form(foreign))
    assert len(sites) == 0
    (rejected,) = sites.rejected
    assert "flash_attn_forward is an attention whose operands are not known" in rejected.reason
    assert "scaled_dot_product_attention" in rejected.reason
