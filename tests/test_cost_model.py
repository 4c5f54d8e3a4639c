"""The cost model against hand-computed cases, torch's FLOP counter on unfused attention, and published numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sympy
import torch
import transformers
from architectures import ARCHITECTURES
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from fxreuse.cost_model import Numbers, Summary, count, formula, macs_of, summarise
from fxreuse.cost_model.einsum import einsum_macs
from fxreuse.cost_model.solve import solve
from fxreuse.errors import InputError, UnsupportedError
from fxreuse.frontend import load_program
from fxreuse.nodes import evaluate
from fxreuse.program import Argument, CallingConvention, Leaf, Program

ATEN = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


class Tracer:
    """Builds a graph over meta tensors, by hand, node by node."""

    def __init__(self, root: torch.nn.Module | None = None) -> None:
        self.root = root or torch.nn.Module()
        self.graph = fx.Graph()

    def input(self, *shape: int, name: str = "x", dtype: torch.dtype = torch.float32) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = meta(*shape, dtype=dtype)
        return node

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = evaluate(target, args, kwargs)
        return node

    def call(self, path: str, inner: torch.nn.Module, *args: fx.Node) -> fx.Node:
        self.root.add_submodule(path, inner) if "." in path else self.root.add_module(path, inner)
        node = self.graph.call_module(path, args)
        graph = getattr(inner, "graph", None)
        results = graph.output_node().args[0] if graph else args[0]
        node.meta["val"] = fx.node.map_arg(results, lambda result: result.meta["val"])
        return node

    def module(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(outputs if len(outputs) > 1 else outputs[0])
        return fx.GraphModule(self.root, self.graph)

    def program(self, *outputs: fx.Node) -> Program:
        names = [str(node.target) for node in self.graph.find_nodes(op="placeholder")]
        leaf = torch.utils._pytree.tree_structure(0)
        arguments = tuple(Argument(name, leaf, (Leaf(name, 2),)) for name in names)
        return Program(self.module(*outputs), CallingConvention((), arguments, leaf), (), "by hand")


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
            ((ATEN.conv1d.default, (2, 4, 9), (6, 1, 4), None, [1], [2], [1], 4), 2 * 6 * 10 * 4)
            if False
            else ((ATEN.conv1d.default, (2, 4, 9), (8, 1, 4), None, [1], [2], [1], 4), 2 * 8 * 10 * 4),
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
        from torch.nn.attention.flex_attention import flex_attention

        class Flex(torch.nn.Module):
            def forward(self, q):
                return flex_attention(q, q, q)

        program = load_program(Flex(), (torch.randn(2, 4, 16, 8),))
        counts = count(program)
        assert [found.itemsize for found in counts.maps] == [4]
        assert summarise(program).at_example({"q": (3, 4, 16, 8)}).macs == 3 * 4 * 16 * 16 * 16

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
