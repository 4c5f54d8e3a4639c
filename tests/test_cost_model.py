"""The cost model against hand-computed cases, torch's FLOP counter on unfused attention, and published numbers."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sympy
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from fxreuse.cost_model import Summary, count, formula, macs_of, summarise
from fxreuse.cost_model.einsum import einsum_macs
from fxreuse.cost_model.solve import solve
from fxreuse.errors import InputError, UnsupportedError
from fxreuse.frontend.load import load_program
from fxreuse.program import Program

from .architectures import Case
from .captures import captured
from .tracer import Tracer, meta

ATEN = torch.ops.aten


def macs(target: Any, *args: Any, **kwargs: Any) -> int:
    """What one call of an operator counts; tuples stand for tensors of that shape."""
    trace = Tracer()

    def operand(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return trace.input(*argument)
        return [operand(item) for item in argument] if isinstance(argument, list) else argument

    given = [operand(argument) for argument in args]
    return int(macs_of(trace(target, *given, **kwargs)))


def counted(run: Any) -> int:
    """What torch counts; it says FLOPs and means 2 for a MAC."""
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


class TestOperators:
    @pytest.mark.parametrize(
        ("call", "expected"),
        [
            ((ATEN.linear.default, (2, 7, 3), (5, 3), (5,)), 2 * 7 * 3 * 5),
            ((ATEN.linear.default, (7, 3), (3,)), 7 * 3),
            ((ATEN.mm.default, (2, 3), (3, 5)), 2 * 3 * 5),
            ((ATEN.bmm.default, (4, 2, 3), (4, 3, 5)), 4 * 2 * 3 * 5),
            ((ATEN.addmm.default, (5,), (2, 3), (3, 5)), 2 * 3 * 5),
            ((ATEN.addmv.default, (2,), (2, 3), (3,)), 2 * 3),
            ((ATEN.baddbmm.default, (4, 2, 5), (4, 2, 3), (4, 3, 5)), 4 * 2 * 3 * 5),
            ((ATEN.addbmm.default, (2, 5), (4, 2, 3), (4, 3, 5)), 4 * 2 * 3 * 5),
            ((ATEN.addmm_.default, (2, 5), (2, 3), (3, 5)), 2 * 3 * 5),
            ((ATEN.dot.default, (3,), (3,)), 3),
            ((ATEN.mv.default, (2, 3), (3,)), 2 * 3),
            ((ATEN.inner.default, (2, 3), (5, 3)), 2 * 3 * 5),
            ((ATEN.linalg_vecdot.default, (4, 3), (1, 3)), 4 * 3),
            ((ATEN.tensordot.default, (2, 3, 4), (4, 3, 5), [1, 2], [1, 0]), 2 * 3 * 4 * 5),
            ((ATEN.tensordot.default, (2, 3), (1, 5), [1], [0]), 2 * 5),
            ((ATEN.einsum.default, "bhid,bhjd->bhij", [(2, 3, 5, 7), (2, 3, 11, 7)]), 2 * 3 * 5 * 7 * 11),
            ((ATEN.bilinear.default, (7, 2), (7, 3), (4, 2, 3)), 7 * 4 * 2 * 3 + 7 * 4 * 3),
            ((ATEN.add.Tensor, (2, 3), (2, 3)), 0),
            ((ATEN.softmax.int, (2, 3), -1), 0),
        ],
        ids=lambda value: value[0].__name__ if isinstance(value, tuple) else "",
    )
    def test_by_hand(self, call, expected):
        assert macs(*call) == expected

    @pytest.mark.parametrize(
        ("left", "right", "expected"),
        [
            ((3,), (3,), 3),
            ((2, 3), (3,), 6),
            ((3,), (3, 5), 15),
            ((4, 2, 3), (3,), 24),
            ((3,), (4, 3, 5), 60),
            ((4, 2, 3), (3, 5), 120),
            ((2, 3), (4, 3, 5), 120),
            ((4, 1, 2, 3), (6, 3, 5), 720),
        ],
    )
    def test_matmul(self, left, right, expected):
        assert macs(ATEN.matmul.default, left, right) == expected

    @pytest.mark.parametrize(
        ("call", "expected"),
        [
            ((ATEN.conv1d.default, (2, 4, 9), (6, 4, 3)), 2 * 6 * 7 * 4 * 3),
            ((ATEN.conv1d.default, (4, 9), (6, 4, 3), None, [2]), 6 * 4 * 4 * 3),
            ((ATEN.conv1d.default, (2, 4, 9), (8, 1, 4), None, [1], [2], [1], 4), 2 * 8 * 10 * 4),
            ((ATEN.conv1d.padding, (2, 4, 9), (6, 2, 3), None, [1], "same", [1], 2), 2 * 6 * 9 * 2 * 3),
            ((ATEN.conv2d.default, (2, 4, 9, 8), (6, 4, 3, 2), None, [3, 2]), 2 * 6 * (3 * 4) * 4 * 6),
            ((ATEN.conv3d.default, (1, 2, 5, 5, 5), (3, 2, 2, 2, 2)), 3 * 64 * 2 * 8),
            ((ATEN.conv_transpose1d.default, (2, 4, 9), (4, 3, 5), None, [2], [0], [0], 2), 2 * 4 * 9 * 3 * 5),
            (
                (ATEN.convolution.default, (2, 4, 9), (4, 3, 5), None, [2], [0], [1], True, [0], 2),
                2 * 4 * 9 * 3 * 5,
            ),
            ((ATEN.convolution.default, (2, 4, 9), (6, 4, 3), None, [1], [0], [1], False, [0], 1), 2 * 6 * 7 * 12),
            ((ATEN.conv_tbc.default, (9, 2, 4), (3, 4, 6), (6,)), 7 * 2 * 6 * 4 * 3),
        ],
    )
    def test_convolution(self, call, expected):
        assert macs(*call) == expected

    def test_fused_attention_counts_scores_and_context(self):
        heads, queries, keys, width, values = 6, 5, 7, 8, 16
        shapes = (2, heads, queries, width), (2, heads, keys, width), (2, heads, keys, values)
        expected = 2 * heads * queries * keys * (width + values)
        assert macs(ATEN.scaled_dot_product_attention.default, *shapes) == expected

    def test_fused_attention_with_grouped_heads_is_counted_per_query_head(self):
        shapes = (2, 6, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8)
        operator = ATEN.scaled_dot_product_attention.default
        assert macs(operator, *shapes, enable_gqa=True) == 2 * 6 * 5 * 5 * 16

    def test_fused_attention_is_counted_in_full_where_causal(self):
        shapes = [(2, 6, 5, 8)] * 3
        operator = ATEN.scaled_dot_product_attention.default
        assert macs(operator, *shapes, is_causal=True) == macs(operator, *shapes) == 2 * 6 * 5 * 5 * 16

    def test_fused_attention_of_a_backend_gives_several_tensors(self):
        shapes = [(2, 6, 5, 8)] * 3
        assert macs(ATEN._scaled_dot_product_flash_attention_for_cpu.default, *shapes) == 2 * 6 * 5 * 5 * 16

    def test_flex_attention(self):
        trace = Tracer()
        q, k, v = (trace.input(2, 4, length, 8, name=name) for name, length in (("q", 5), ("k", 7), ("v", 7)))
        node = trace.graph.call_function(torch.ops.higher_order.flex_attention, (q, k, v, None, (5, 7), 0.35, {}))
        node.meta["val"] = (meta(2, 4, 5, 8), meta(2, 4, 5), meta(2, 4, 5))
        counts = count(trace.program(trace(operator.getitem, node, 0)))
        assert counts.macs == 2 * 4 * 5 * 7 * 16
        assert counts.map_bytes == 4 * 2 * 4 * 5 * 7

    def test_grouped_product(self):
        ends = torch.tensor([3, 7], dtype=torch.int32)
        rows = torch.empty(7, 16, dtype=torch.bfloat16)
        experts = torch.empty(2, 16, 32, dtype=torch.bfloat16)
        trace = Tracer()
        node = trace.graph.call_function(ATEN._grouped_mm.default, tuple(trace.input(1, name=n) for n in "abc"))
        for operand, value in zip(node.args, (rows, experts, ends), strict=True):
            operand.meta["val"] = value
        node.meta["val"] = meta(7, 32)
        assert macs_of(node) == 7 * 16 * 32

    def test_experts_of_transformers(self):
        """Which go through an operator of that library where a graph is captured."""
        width, middle, experts, layers, each = 32, 48, 3, 2, 2
        config = transformers.MixtralConfig(
            vocab_size=50, hidden_size=width, intermediate_size=middle, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=4, num_local_experts=experts, num_experts_per_tok=each,
        )  # fmt: skip
        summary = summarise(load_program(transformers.MixtralModel(config).eval(), torch.zeros(2, 5, dtype=torch.long)))
        found = summary.counts.macs_by_op["transformers.grouped_mm_fallback"]
        assert found == layers * each * 3 * width * middle * summary.symbols["B"] * summary.symbols["T"]

    @pytest.mark.parametrize(
        ("operator", "args"),
        [
            (ATEN.cdist.default, [(2, 3), (5, 3)]),
            (ATEN.linalg_inv.default, [(3, 3)]),
            (ATEN.gru_cell.default, [(2, 3), (2, 5), (15, 3), (15, 5)]),
        ],
    )
    def test_an_operator_without_a_formula_is_refused_by_name(self, operator, args):
        with pytest.raises(UnsupportedError, match=operator._schema.name.replace("::", r"\.")):
            macs(operator, *args)

    def test_a_custom_operator_is_refused_until_its_formula_is_declared(self):
        @torch.library.custom_op("fxreuse_test::square", mutates_args=())
        def square(x: torch.Tensor) -> torch.Tensor:
            return x @ x

        square.register_fake(torch.empty_like)
        operator = torch.ops.fxreuse_test.square.default
        with pytest.raises(UnsupportedError, match=r"formula\('fxreuse_test\.square'\)"):
            macs(operator, (3, 3))
        formula("fxreuse_test.square")(lambda node: sympy.Integer(27))
        assert macs(operator, (3, 3)) == 27

    def test_a_function_that_is_no_operator_is_refused(self):
        with pytest.raises(UnsupportedError, match="matmul"):
            macs(torch.matmul, (2, 3), (3, 5))


@st.composite
def einsums(draw) -> tuple[str, list[tuple[int, ...]], list[int] | None]:
    """An equation, shapes that fit it, dimensions of size 1 among them, and perhaps a path."""
    letters = "abcdefg"
    sizes = {letter: draw(st.integers(1, 6)) for letter in letters}
    term = st.lists(st.sampled_from(letters), min_size=1, max_size=4, unique=True)
    terms = draw(st.lists(term, min_size=1, max_size=4))
    used = sorted({letter for term in terms for letter in term})
    output = draw(st.lists(st.sampled_from(used), unique=True, max_size=4))
    shapes = [tuple(1 if draw(st.integers(0, 5)) == 0 else sizes[letter] for letter in term) for term in terms]
    path: list[int] = []
    if len(terms) > 2 and draw(st.booleans()):
        for left in range(len(terms), 1, -1):
            path += draw(st.permutations(range(left)))[:2]
    return ",".join(map("".join, terms)) + "->" + "".join(output), shapes, path or None


class TestEinsum:
    @given(einsums())
    def test_counts_what_torch_executes(self, case):
        equation, shapes, path = case
        expected = counted(lambda: ATEN.einsum(equation, [meta(*shape) for shape in shapes], path=path))
        assert einsum_macs(equation, [tuple(map(sympy.Integer, shape)) for shape in shapes], path) == expected

    @pytest.mark.parametrize(
        ("equation", "shapes"),
        [
            ("...ij,...jk->...ik", [(2, 4, 3, 5), (4, 5, 7)]),
            ("...ij,jk", [(2, 4, 3, 5), (5, 7)]),
            ("ij, jk", [(3, 5), (5, 7)]),
            ("b...d,...d->b", [(2, 3, 5), (3, 5)]),
        ],
    )
    def test_ellipsis_and_implicit_output(self, equation, shapes):
        expected = counted(lambda: torch.einsum(equation, *(meta(*shape) for shape in shapes)))
        assert macs(ATEN.einsum.default, equation, shapes) == expected > 0

    def test_follows_the_path_it_is_given(self):
        shapes = [(2, 30), (30, 40), (40, 3)]
        in_order, backwards = 2 * 30 * 40 + 2 * 40 * 3, 30 * 40 * 3 + 2 * 30 * 3
        assert macs(ATEN.einsum.default, "ab,bc,cd->ad", shapes) == in_order
        assert macs(ATEN.einsum.default, "ab,bc,cd->ad", shapes, path=[1, 2, 0, 1]) == backwards


def attend(trace: Any, query: fx.Node, key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
    """An unfused attention. Returns its map and its context."""
    scores = trace(ATEN.mul.Tensor, trace(ATEN.matmul.default, query, trace(ATEN.transpose.int, key, -2, -1)), 0.35)
    probs = trace(ATEN.softmax.int, scores, -1)
    return probs, trace(ATEN.matmul.default, probs, value)


class TestMaps:
    """Batch 2, heads 3, 5 queries, 7 keys, width 8."""

    MAP = 2 * 3 * 5 * 7

    def inputs(self, trace: Tracer) -> list[fx.Node]:
        sizes = {"q": 5, "k": 7, "v": 7, "w": 7}
        return [trace.input(2, 3, length, 8, name=name) for name, length in sizes.items()]

    def map_bytes(self, trace: Tracer, *outputs: fx.Node) -> int:
        return int(count(trace.program(*outputs)).map_bytes)

    def test_unfused(self):
        trace = Tracer()
        q, k, v, _ = self.inputs(trace)
        assert self.map_bytes(trace, attend(trace, q, k, v)[1]) == 4 * self.MAP

    def test_fused(self):
        trace = Tracer()
        q, k, v, _ = self.inputs(trace)
        assert self.map_bytes(trace, trace(ATEN.scaled_dot_product_attention.default, q, k, v)) == 4 * self.MAP

    def test_element_size_is_that_of_the_map_that_meets_the_values(self):
        trace = Tracer()
        q, k = (trace.input(2, 3, n, 8, name=name, dtype=torch.bfloat16) for name, n in (("q", 5), ("k", 7)))
        scores = trace(ATEN.matmul.default, q, trace(ATEN.transpose.int, k, -2, -1))
        probs = trace(ATEN.to.dtype, trace(ATEN.softmax.int, scores, -1, torch.float32), torch.bfloat16)
        assert self.map_bytes(trace, trace(ATEN.matmul.default, probs, k)) == 2 * self.MAP

    def test_a_stored_map_with_two_readers_is_one(self):
        trace = Tracer()
        q, k, v, w = self.inputs(trace)
        probs, first = attend(trace, q, k, v)
        assert self.map_bytes(trace, first, trace(ATEN.matmul.default, probs, w)) == 4 * self.MAP

    def test_through_dropout_views_and_batched_heads(self):
        trace = Tracer()
        q, k, v = (trace.input(6, n, 8, name=name) for name, n in (("q", 5), ("k", 7), ("v", 7)))
        probs = trace(ATEN.softmax.int, trace(ATEN.bmm.default, q, trace(ATEN.transpose.int, k, 1, 2)), -1)
        dropped = trace.call("dropout", torch.nn.Dropout(0.1), trace(ATEN.view.default, probs, [2, 3, 5, 7]))
        merged = trace(ATEN.view.default, dropped, [6, 5, 7])
        assert self.map_bytes(trace, trace(ATEN.bmm.default, merged, v)) == 4 * self.MAP

    def test_einsum(self):
        trace = Tracer()
        q, k, v, _ = self.inputs(trace)
        probs = trace(ATEN.softmax.int, trace(ATEN.einsum.default, "bhid,bhjd->bhij", [q, k]), -1)
        assert self.map_bytes(trace, trace(ATEN.einsum.default, "bhij,bhjd->bihd", [probs, v])) == 4 * self.MAP

    @pytest.mark.parametrize("pad", [False, True])
    def test_fused_again_on_the_same_query_and_key_is_the_same_map(self, pad):
        trace = Tracer()
        q, k, v, w = self.inputs(trace)
        first = trace(ATEN.scaled_dot_product_attention.default, q, k, v)
        if pad:
            q, k, w = (trace(ATEN.constant_pad_nd.default, x, [0, 8], 0.0) for x in (q, k, w))
        second = trace(ATEN.scaled_dot_product_attention.default, q, k, w, scale=8**-0.5)
        assert self.map_bytes(trace, first, second) == 4 * self.MAP

    def test_fused_on_the_query_and_key_of_a_softmax_is_the_same_map(self):
        trace = Tracer()
        q, k, v, w = self.inputs(trace)
        context = attend(trace, q, k, v)[1]
        fused = trace(ATEN.scaled_dot_product_attention.default, q, k, w, trace.input(5, 7, name="bias"))
        assert self.map_bytes(trace, context, fused) == 4 * self.MAP

    def test_another_key_or_mask_makes_another_map(self):
        trace = Tracer()
        q, k, v, w = self.inputs(trace)
        operator, bias = ATEN.scaled_dot_product_attention.default, trace.input(5, 7, name="bias")
        three = [trace(operator, q, k, v), trace(operator, q, w, v), trace(operator, q, k, v, bias)]
        assert self.map_bytes(trace, *three) == 3 * 4 * self.MAP

    def test_chunks_of_one_projection_are_not_confused(self):
        trace = Tracer()
        x = trace.input(2, 3, 5, 32)
        a, b, c, d = (trace(ATEN.slice.Tensor, x, -1, 8 * i, 8 * i + 8) for i in range(4))
        operator = ATEN.scaled_dot_product_attention.default
        assert self.map_bytes(trace, trace(operator, a, b, a), trace(operator, c, d, a)) == 2 * 4 * 2 * 3 * 5 * 5

    def test_softmaxes_that_are_no_attention(self):
        trace = Tracer()
        x = trace.input(2, 5, 8)
        classifier = trace(ATEN.softmax.int, x, -1)
        pooling = trace(ATEN.softmax.int, trace(ATEN.select.int, x, -1, 0), -1)
        pooled = trace(ATEN.bmm.default, trace(ATEN.unsqueeze.default, pooling, 1), x)
        experts = trace.input(2, 5, 8, 4, name="experts")
        router = trace(ATEN.mul.Tensor, trace(ATEN.unsqueeze.default, classifier, -1), experts)
        assert self.map_bytes(trace, classifier, pooled, router) == 0


def outlined(recompute: bool) -> Program:
    """A leader and a follower as layers of their own: the follower is handed the leader's map, or its query and key."""
    leader, follower, outer = Tracer(), Tracer(), Tracer()
    x = leader.input(2, 3, 5, 8)
    weight = torch.nn.Parameter(meta(8, 8))
    leader.root.weight = weight
    projection = leader.graph.get_attr("weight")
    projection.meta["val"] = weight
    q = leader(ATEN.linear.default, x, projection)
    probs, context = attend(leader, q, x, x)
    first = leader.module(context, *((q, x) if recompute else (probs,)))
    y = follower.input(2, 3, 5, 8)
    if recompute:
        shared = [follower.input(2, 3, 5, 8, name=name) for name in "qk"]
        second = follower.module(follower(ATEN.scaled_dot_product_attention.default, *shared, y))
    else:
        shared = [follower.input(2, 3, 5, 5, name="map")]
        second = follower.module(follower(ATEN.matmul.default, shared[0], y))
    z = outer.input(2, 3, 5, 8)
    made = outer.call("leader", first, z)
    parts = [outer(operator.getitem, made, i) for i in range(1 + len(shared))]
    return outer.program(outer.call("follower", second, *parts))


class TestOutlined:
    PROJECTION, PRODUCT = 2 * 3 * 5 * 8 * 8, 2 * 3 * 5 * 5 * 8

    @pytest.mark.parametrize(("recompute", "products"), [(False, 3), (True, 4)])
    def test_counts_inside_layers_and_sees_one_map_across_them(self, recompute, products):
        counts = count(outlined(recompute))
        assert counts.params == 64
        assert counts.macs == self.PROJECTION + products * self.PRODUCT
        assert [(found.path, found.bytes) for found in counts.maps] == [("leader", 4 * 2 * 3 * 5 * 5)]
        assert counts.macs_by_module == {
            "leader": self.PROJECTION + 2 * self.PRODUCT,
            "follower": (products - 2) * self.PRODUCT,
        }

    def test_a_layer_that_is_called_twice_counts_twice(self):
        inner, outer = Tracer(), Tracer()
        x = inner.input(4, 4)
        layer = inner.module(inner(ATEN.mm.default, x, x))
        once = outer.call("layer", layer, outer.input(4, 4))
        assert count(outer.program(outer.call("layer", layer, once))).macs == 2 * 4**3

    def test_modules_without_weight_matrices_cost_nothing_and_others_are_refused(self):
        trace = Tracer()
        x = trace.call("norm", torch.nn.BatchNorm1d(4), trace.input(2, 4))
        assert count(trace.program(trace.call("dropout", torch.nn.Dropout(), x))).macs == 0
        trace = Tracer()
        with pytest.raises(UnsupportedError, match="GRUCell at inner has weight matrices"):
            count(trace.program(trace.call("inner", torch.nn.GRUCell(4, 4), trace.input(2, 4))))

    def test_linear_and_convolution_modules_cost_what_their_operators_do(self):
        trace = Tracer()
        linear = count(trace.program(trace.call("inner", torch.nn.Linear(4, 4), trace.input(2, 4))))
        assert linear.macs_by_op == {"aten.linear": 2 * 4 * 4}
        trace = Tracer()
        convolution = torch.nn.Conv1d(4, 4, 3, padding=1, groups=2)
        found = count(trace.program(trace.call("inner", convolution, trace.input(2, 4, 9))))
        assert found.macs_by_op == {"aten.conv1d": 2 * 4 * 9 * (4 // 2) * 3}


@contextmanager
def unfused() -> Iterator[None]:
    """Fused attention done by products and a softmax, which torch's counter sees."""
    fused = functional.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        return (query @ key.transpose(-2, -1)).softmax(-1) @ value

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = fused


def eager(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the model with the attention that its authors wrote out, where it has one."""
    model = copy.deepcopy(model)
    if isinstance(model, transformers.PreTrainedModel):
        model.set_attn_implementation("eager")
    return model


def sizes_of(inputs: Any) -> dict[str, tuple[int, ...]]:
    named = inputs if isinstance(inputs, dict) else {"src": inputs[0]}
    return {name: tuple(value.shape) for name, value in named.items()}


# One of every kind: padding, grouped heads, score bias, windows, convolutions, relative shift, torch's own modules.
MODELS = [
    "bert_padded", "gpt2_dense", "llama_dense", "t5_encoder_dense", "swin", "wavlm_unmasked", "conformer_relative",
    "torch_encoder_postnorm",
]  # fmt: skip


@functools.cache
def loaded(name: str) -> tuple[Case, Summary]:
    found = captured(name)
    return found.case, summarise(found.program, sizes_of(found.case.inputs))


class TestModels:
    @pytest.mark.parametrize("name", MODELS)
    def test_equals_torch_on_unfused_attention_at_two_sizes(self, name):
        case, summary = loaded(name)
        assert summary.params == sum(parameter.numel() for parameter in case.model.parameters())
        model = eager(case.model)
        for inputs in (case.inputs, case.other_inputs):
            with unfused():
                run = (lambda: model(**inputs)) if isinstance(inputs, dict) else (lambda: model(*inputs))
                expected = counted(run)
            assert summary.at_example(sizes_of(inputs)).macs == expected
        assert summary.at_example() == summary.at_example(sizes_of(case.inputs))
        assert sum(summary.counts.macs_by_op.values()).expand() == summary.macs
        assert sum(summary.counts.macs_by_module.values()).expand() == summary.macs


@pytest.fixture(scope="module")
def bert() -> Summary:
    return loaded("bert_padded")[1]


@pytest.fixture(scope="module")
def hubert_base() -> Summary:
    with torch.device("meta"):
        model = transformers.HubertModel(transformers.HubertConfig())
        samples = torch.empty(2, 16000)
    return summarise(load_program(model, {"input_values": samples}))


class TestSummary:
    def test_closed_form_in_batch_and_tokens(self, bert):
        b, t = bert.symbols["B"], bert.symbols["T"]
        layers, d, f = 4, 32, 64
        assert bert.macs == (layers * (b * t * (4 * d * d + 2 * d * f) + 2 * b * t * t * d) + b * d * d).expand()
        assert bert.map_bytes == 4 * layers * 4 * b * t * t

    def test_numbers_by_any_name_of_a_size(self, bert):
        expected = bert.at(B=3, T=14)
        assert bert.at(input_ids_0=3, attention_mask_1=14) == expected
        assert expected.sizes == {"B": 3, "T": 14, "attention_mask_0": 3}
        assert expected.map_bytes == 4 * 4 * 4 * 3 * 14**2

    def test_numbers_at_the_sizes_of_the_example(self, bert):
        assert bert.at_example() == bert.at(B=2, T=11)
        assert bert.at_example({"input_ids": (1, 11), "attention_mask": (1, 11)}) == bert.at(B=1, T=11)

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"B": 2}, r"size T is missing.*B \(or .*input_ids_0.*T \(or .*input_ids_1"),
            ({"B": 2, "T": 3, "tokens": 3}, "no size 'tokens'.*B .*T "),
            ({"B": 2, "T": 3, "input_ids_1": 4}, "input_ids_1 = 4 does not fit: it is 3, fixed by T"),
            ({"B": 2, "T": 3.5}, "T is 3.5"),
        ],
    )
    def test_errors_name_the_sizes(self, bert, sizes, message):
        with pytest.raises(InputError, match=message):
            bert.at(**sizes)

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            ({"ids": (2, 3)}, "no input 'ids'. The inputs are: input_ids, attention_mask"),
            ({"input_ids": (2, 3, 4)}, "input_ids has 2 dimensions"),
            ({"input_ids": (2, 3), "attention_mask": (2, 4)}, "attention_mask, dimension 1 = 4 does not fit: it is 3"),
        ],
    )
    def test_errors_name_the_inputs(self, bert, shapes, message):
        with pytest.raises(InputError, match=message):
            bert.at_example(shapes)

    def test_hubert_base_on_ten_seconds(self, hubert_base):
        sizes = {"B": 1, "input_values_1": 160_000, "T": 499}
        found = hubert_base.at(B=1, input_values_1=160_000)
        assert (found.params, found.macs, found.map_bytes) == (94_371_712, 74_066_523_136, 12 * 12 * 499**2 * 4)
        assert found.sizes == sizes
        assert hubert_base.at_example({"input_values": (1, 160_000)}) == found

    def test_a_polynomial_in_the_length_of_the_layers(self, hubert_base):
        b, t = hubert_base.symbols["B"], hubert_base.symbols["T"]
        layers, d, f = 12, 768, 3072
        assert hubert_base.macs.coeff(b * t**2) == layers * 2 * d
        positions, projection, last_convolution = 128 * d * d // 16, 512 * d, 2 * 512 * 512
        expected = layers * (4 * d * d + 2 * d * f) + positions + projection + last_convolution
        assert hubert_base.macs.coeff(b * t).subs(t, 0) == expected
        assert set(hubert_base.relations) == {"T"}

    def test_a_derived_length_takes_the_smallest_input_that_gives_it(self, hubert_base):
        found = hubert_base.at(B=1, T=499).sizes["input_values_1"]
        assert hubert_base.at(B=1, input_values_1=found).sizes["T"] == 499
        assert hubert_base.at(B=1, input_values_1=found - 1).sizes["T"] == 498

    def test_two_sequences_have_two_lengths(self):
        summary = loaded("bart_encoder")[1]
        b, t, u = (summary.symbols[name] for name in ("B", "T", "decoder_input_ids_1"))
        assert summary.map_bytes == (4 * 4 * 4 * b * (t * t + u * u + t * u)).expand()

    def test_tokens_first(self):
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
        summary = summarise(load_program(layer, (torch.randn(11, 3, 8),)))
        assert summary.map_bytes == 4 * 2 * summary.symbols["B"] * summary.symbols["T"] ** 2
        assert summary.at_example().sizes == {"T": 11, "B": 3}


class TestRewritten:
    """Two followers of four layers: each loses Q and K, and with a stored map also the product of the two."""

    @pytest.mark.parametrize(("lowering", "products"), [("materialize", 2), ("recompute", 0)])
    def test_a_rewritten_model_counts_what_is_left_of_it(self, lowering, products):
        _, before = loaded("bert_padded")
        small = captured("bert_padded").apply(f"2x2 lowering={lowering}")
        after = summarise(Program(small, small.convention, small.guards, small.name))
        b, t, d = before.symbols["B"], before.symbols["T"], 32
        assert before.params - after.params == 2 * 2 * (d * d + d)
        assert before.macs - after.macs == 2 * 2 * b * t * d * d + products * b * t * t * d
        assert after.map_bytes == before.map_bytes / 2
        layers = {path.partition(".attention")[0] for path in (found.path for found in after.counts.maps)}
        assert layers == {"encoder.layer.0", "encoder.layer.2"}


class TestSolve:
    @given(st.integers(1, 10**6), st.integers(1, 400), st.integers(0, 400))
    def test_finds_the_smallest_size(self, size, stride, kernel):
        symbol = sympy.Symbol("s", integer=True, positive=True)
        frames = sympy.floor((symbol - kernel) / stride) + 1
        value = int(frames.subs(symbol, size))
        found = solve([("frames", frames, value)])[symbol]
        assert found <= size
        assert frames.subs(symbol, found) == value
        assert found == 1 or frames.subs(symbol, found - 1) < value

    def test_a_value_that_no_size_gives(self):
        symbol = sympy.Symbol("s", integer=True, positive=True)
        with pytest.raises(InputError, match=r"no size gives it\. Near it is tokens = 8"):
            solve([("tokens", 2 * symbol, 7)])

    def test_a_fixed_size(self):
        with pytest.raises(InputError, match="what the capture fixed"):
            solve([("pixels", sympy.Integer(32), 64)])
