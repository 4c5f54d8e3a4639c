"""What each operator reads, writes and computes, and what only makes a view, against graphs built by hand."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxreuse.cost_model import Operation, operations
from fxreuse.cost_model.aliasing import is_viewable, strides
from fxreuse.cost_model.parts import Parts
from fxreuse.cost_model.sizes import shape
from fxreuse.map_workspace import attention_map

from .tracer import Tracer, meta

ATEN = torch.ops.aten


def parameter(trace: Tracer, *shape: int, name: str = "weight") -> torch.fx.Node:
    setattr(trace.root, name, torch.nn.Parameter(meta(*shape)))
    node = trace.graph.get_attr(name)
    node.meta["val"] = meta(*shape)
    return node


def made(trace: Tracer, *outputs: torch.fx.Node) -> Operation:
    """The last operation of a graph."""
    return operations(trace.program(*outputs))[-1]


class TestTraffic:
    def test_elementwise(self):
        trace = Tracer()
        found = made(trace, trace(ATEN.gelu.default, trace.input(2, 3)))
        assert (found.kind, found.elements, found.bytes_read, found.bytes_written) == ("elementwise", 6, 24, 24)
        assert (found.macs, found.view, found.shapes) == (0, False, ((2, 3), (2, 3)))

    def test_an_operand_that_is_there_twice_is_read_once(self):
        trace = Tracer()
        x = trace.input(2, 3)
        assert made(trace, trace(ATEN.mul.Tensor, x, x)).bytes_read == 24

    def test_chunks_are_views_of_one_storage(self):
        trace = Tracer()
        chunks = trace(ATEN.chunk.default, trace.input(2, 6), 2, -1)
        left, right = (trace(operator.getitem, chunks, place) for place in (0, 1))
        split, product = operations(trace.program(trace(ATEN.mul.Tensor, left, right)))
        assert split.view
        assert {access.storage for access in product.reads} == {split.reads[0].storage}
        assert product.bytes_written == 24

    def test_results_of_one_operator_are_storages_of_their_own(self):
        trace = Tracer()
        both = trace(ATEN.topk.default, trace.input(2, 6), 3)
        values, places = (trace(operator.getitem, both, place) for place in (0, 1))
        topk, gather = operations(trace.program(trace(ATEN.gather.default, values, 1, places)))
        assert [access.bytes for access in topk.writes] == [24, 48]
        assert topk.elements == 12
        assert {access.storage for access in gather.reads} == {access.storage for access in topk.writes}

    def test_what_is_broadcast_is_read_once(self):
        trace = Tracer()
        wide = trace(ATEN.expand.default, trace.input(1, 3), [5, 3])
        assert made(trace, trace(ATEN.exp.default, wide)).bytes_read == 12

    def test_a_gather_reads_what_it_gives(self):
        trace = Tracer()
        found = made(
            trace, trace(ATEN.embedding.default, parameter(trace, 1000, 8), trace.input(2, 3, dtype=torch.int64))
        )
        assert (found.kind, found.bytes_read, found.bytes_written) == ("gather", 6 * 32 + 6 * 8, 6 * 32)

    def test_a_linear_reads_its_parameters(self):
        trace = Tracer()
        weight = parameter(trace, 4, 8)
        found = made(trace, trace(ATEN.linear.default, trace.input(3, 8), weight))
        assert (found.kind, found.macs, found.elements) == ("linear", 3 * 8 * 4, 0)
        assert [(access.role, access.bytes) for access in found.reads] == [("input", 96), ("parameter", 128)]

    @pytest.mark.parametrize(
        ("leaf", "kind", "read", "macs"),
        [
            (torch.nn.Linear(8, 8), "linear", 96 + 256 + 32, 3 * 64),
            (torch.nn.LayerNorm(8), "normalisation", 96 + 64, 0),
            (torch.nn.Dropout(0.1), "view", 0, 0),
            (torch.nn.GELU(), "elementwise", 96, 0),
        ],
    )
    def test_modules_that_are_called_whole(self, leaf, kind, read, macs):
        trace = Tracer()
        found = made(trace, trace.call("inner", leaf, trace.input(3, 8)))
        assert (found.kind, found.bytes_read, found.macs) == (kind, read, macs)
        assert found.bytes_written == (0 if kind == "view" else 96)

    def test_an_attention_writes_its_context_only(self):
        trace = Tracer()
        q, k, v = (trace.input(2, 3, n, 8, name=name) for name, n in (("q", 5), ("k", 7), ("v", 7)))
        found = made(trace, trace(ATEN.scaled_dot_product_attention.default, q, k, v))
        assert (found.kind, found.elements, found.bytes_written) == ("attention", 2 * 3 * 5 * 7, 4 * 2 * 3 * 5 * 8)

    def test_a_stored_map_is_written(self):
        trace = Tracer()
        q, k = (trace.input(2, 3, n, 8, name=name) for name, n in (("q", 5), ("k", 7)))
        found = made(trace, trace(attention_map, q, k, None, False, 1.0))
        assert (found.kind, found.elements, found.bytes_written) == ("map", 2 * 3 * 5 * 7, 4 * 2 * 3 * 5 * 7)

    def test_work_in_place_writes_to_its_operand(self):
        trace = Tracer()
        x = trace(ATEN.exp.default, trace.input(2, 3))
        exp, add = operations(trace.program(trace(ATEN.add_.Tensor, x, 1)))
        assert add.writes == exp.writes
        assert add.bytes == 48


class TestViews:
    @pytest.mark.parametrize(
        ("target", "arguments", "view"),
        [
            (ATEN.transpose.int, (0, 1), True),
            (ATEN.reshape.default, ([3, 2, 4],), True),
            (ATEN.reshape.default, ([4, 6],), True),
            (ATEN.contiguous.default, (), True),
            (ATEN.clone.default, (), False),
            (ATEN.to.dtype, (torch.float32,), True),
            (ATEN.to.dtype, (torch.float32, False, True), False),
            (ATEN.to.dtype, (torch.float64,), False),
            (ATEN.dropout.default, (0.1, False), True),
            (ATEN.dropout.default, (0.1, True), False),
            (ATEN.slice.Tensor, (0, 0, 2), True),
            (ATEN.flatten.using_ints, (), True),
        ],
        ids=str,
    )
    def test_of_a_contiguous_tensor(self, target, arguments, view):
        trace = Tracer()
        assert made(trace, trace(target, trace.input(6, 4), *arguments)).view is view

    def test_a_reshape_of_a_transposed_tensor_copies(self):
        trace = Tracer()
        flipped = trace(ATEN.transpose.int, trace.input(6, 4), 0, 1)
        found = made(trace, trace(ATEN.reshape.default, flipped, [24]))
        assert (found.kind, found.bytes) == ("copy", 2 * 96)

    def test_heads_merge_without_a_copy_behind_a_fused_attention_of_projections(self):
        trace = Tracer()
        q, k, v = (trace(ATEN.transpose.int, trace.input(2, 5, 3, 8, name=name), 1, 2) for name in "qkv")
        context = trace(ATEN.scaled_dot_product_attention.default, q, k, v)
        merged = trace(ATEN.reshape.default, trace(ATEN.transpose.int, context, 1, 2), [2, 5, 24])
        assert made(trace, merged).view

    def test_a_fused_attention_lays_its_result_out_as_its_query(self):
        trace = Tracer()
        given = [
            trace.input(2, 3, 5, 8, name=name) for name in "qkv"
        ]  # heads outermost, as a concatenation leaves them
        context = trace(ATEN.scaled_dot_product_attention.default, *given)
        merged = trace(ATEN.reshape.default, trace(ATEN.transpose.int, context, 1, 2), [2, 5, 24])
        assert made(trace, merged).kind == "copy"
        q, k, v = (torch.randn(2, 3, 5, 8) for _ in "qkv")
        assert torch.nn.functional.scaled_dot_product_attention(q, k, v).is_contiguous()

    def test_a_view_in_the_same_shape_is_laid_out_as_its_operand(self):
        """A rewrite may leave one behind another kernel than the one whose layout it was captured with."""
        trace = Tracer()
        q, k, v = (trace(ATEN.transpose.int, trace.input(2, 5, 3, 8, name=name), 1, 2) for name in "qkv")
        fused = trace(ATEN.scaled_dot_product_attention.default, q, k, v)
        same = trace(ATEN.reshape.default, fused, [2, 3, 5, 8])
        same.replace_input_with(fused, trace.input(2, 3, 5, 8, name="product"))
        merged = trace(ATEN.reshape.default, trace(ATEN.transpose.int, same, 1, 2), [2, 5, 24])
        assert not is_viewable(shape(merged.args[0]), strides(merged.args[0]), shape(merged))

    @given(st.data())
    def test_viewable_as_torch_has_it(self, data: Any):
        sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4))
        dims = data.draw(st.permutations(range(len(sizes))))
        x = torch.empty(sizes).permute(dims)
        factors = [factor for size in sizes for factor in {1: (1,), 2: (2,), 3: (3,), 4: (2, 2)}[size]]
        factors = data.draw(st.permutations(factors))
        cuts = sorted(data.draw(st.sets(st.integers(1, len(factors)), max_size=3)))
        bounds = zip([0, *cuts], [*cuts, len(factors)], strict=True)
        wanted = [torch.Size(factors[low:high]).numel() for low, high in bounds]
        try:
            x.view(wanted)
            expected = True
        except RuntimeError:
            expected = False
        given_ = [tuple(map(sympy.Integer, part)) for part in (x.shape, x.stride(), wanted)]
        assert is_viewable(*given_) is expected


class TestLayers:
    def test_operators_know_their_layer_and_the_call_comes_last(self):
        inner, outer = Tracer(), Tracer()
        x = inner.input(4, 4)
        layer = inner.module(inner(ATEN.mm.default, x, x))
        program = outer.program(outer.call("layer", layer, outer.input(4, 4)))
        product, call = operations(program, Parts(frozenset({"layer"})))
        assert (product.layer, product.module, call.kind) == ("layer", "layer", "call")
        assert call.bytes == 0
        assert call.reads[0].storage == product.reads[0].storage
