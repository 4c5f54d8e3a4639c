"""A softmax that is no attention is not taken for one, and the reason is data."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim

from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program

from .handwritten import Attention, find_in
from .test_layout import PackedCross


class TokenPooling(torch.nn.Module):
    """A weight for every token, and their weighted mean."""

    def __init__(self) -> None:
        super().__init__()
        self.score = torch.nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.score(x).softmax(1).mT @ x).squeeze(1)


class LearnedQuery(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.probe = torch.nn.Parameter(torch.randn(1, 1, 8))
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probe = self.probe.expand(x.shape[0], -1, -1)
        return self.attention(probe, x, x, need_weights=False)[0]


class LearnedSlots(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slots = torch.nn.Parameter(torch.randn(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.slots).softmax(1).mT @ x


class Router(torch.nn.Module):
    """A mixture of two experts, weighted by a product over the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(8, 2)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.gate(x).softmax(-1)
        return torch.einsum("bte,bted->btd", weights, torch.stack([e(x) for e in self.experts], 2))


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.mean(1)).softmax(-1)


class Gumbel(torch.nn.Module):
    """A soft choice from a codebook, as in a vector quantiser."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Linear(8, 6)
        self.codebook = torch.nn.Parameter(torch.randn(6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gumbel_softmax(self.logits(x), tau=2.0) @ self.codebook


class WrongAxis(Attention):
    """Normalised over queries, contracted over keys."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(p(x)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return (q @ k.mT).softmax(-2) @ v


class WithItself(Attention):
    """The product of a map with itself has no values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probs = (self.q(x) @ self.k(x).mT).softmax(-1)
        return probs @ probs


REJECTED = {
    TokenPooling: "a projection by parameters",
    LearnedQuery: "learned vectors, the same for every input",
    LearnedSlots: "a projection by parameters",
    Router: "a projection by parameters",
    Classifier: "no matrix product contracts it over its own axis",
    Gumbel: "a projection by parameters",
    WrongAxis: "over another axis than the one that it is normalised over",
    WithItself: "no matrix product contracts it over its own axis",
}


@pytest.mark.parametrize("module", REJECTED)
def test_a_softmax_that_is_no_attention_is_rejected_with_a_reason(module: type[torch.nn.Module]) -> None:
    program, sites = find_in(module())
    assert len(sites) == 0
    (rejected,) = sites.rejected
    assert REJECTED[module] in rejected.reason
    assert program.node(rejected.node).op == "call_function"
    assert str(rejected.reason) in str(sites)


def test_a_rejection_names_the_line_of_the_model() -> None:
    (rejected,) = find_in(Classifier())[1].rejected
    assert "test_find_rejected.py" in rejected.source
    assert rejected.source.endswith("return self.head(x.mean(1)).softmax(-1)")


def test_rejected_softmaxes_count_in_the_order_of_a_module_call() -> None:
    class Gated(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = x.softmax(-1)
            return torch.nn.functional.scaled_dot_product_attention(self.q(x * gate), self.k(x * gate), self.v(x))

    _, sites = find_in(Gated())
    assert [site.order for site in sites] == [1]
    assert len(sites.rejected) == 1


def test_a_model_without_attention_has_no_sites_and_no_rejections() -> None:
    _, sites = find_in(torch.nn.Linear(8, 8))
    assert len(sites) == len(sites.rejected) == 0
    assert "no attention found" in str(sites)


def test_a_value_width_that_depends_on_an_input_is_refused() -> None:
    """Exported without what a capture adds, cross attention of one packed weight has values of a symbolic width."""
    sizes = ({0: Dim.AUTO, 1: Dim.AUTO},) * 2
    inputs = torch.randn(3, 5, 8), torch.randn(3, 7, 8)
    program = load_program(torch.export.export(PackedCross().eval(), inputs, dynamic_shapes=sizes, strict=False))
    found = find(program)
    assert len(found) == 0
    assert "value width" in found.rejected[0].reason
