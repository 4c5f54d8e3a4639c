"""Operators under their public names give what the overloads give, bit by bit, eagerly and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxreuse.emission.plain_calls import _PLAIN, use_plain_calls

aten = torch.ops.aten
X, Y, W = torch.randn(2, 3, 4), torch.randn(2, 3, 4).double(), torch.randn(5, 4)
Q = torch.randn(2, 2, 6, 4)
CALLS = {
    aten.add.Tensor: ((X, X), {"alpha": 2}),
    aten.bmm.default: ((X, X.mT), {}),
    aten.cat.default: (([X, X], -1), {}),
    aten.div.Tensor: ((X, 3), {}),
    aten.flatten.using_ints: ((X, 1, -1), {}),
    aten.gelu.default: ((X,), {"approximate": "tanh"}),
    aten.index_select.default: ((X, 1, torch.tensor([2, 0])), {}),
    aten.linear.default: ((X, W, None), {}),
    aten.matmul.default: ((X, W.mT), {}),
    aten.mul.Tensor: ((X, X), {}),
    aten.permute.default: ((X, [2, 0, 1]), {}),
    aten.relu.default: ((X,), {}),
    aten.reshape.default: ((X, [6, -1]), {}),
    aten.scaled_dot_product_attention.default: ((Q, Q, Q, None, 0.0, True), {"scale": 0.3, "enable_gqa": False}),
    aten.sigmoid.default: ((X,), {}),
    aten.split_with_sizes.default: ((X, [1, 2], 1), {}),
    aten.sub.Tensor: ((X, X), {"alpha": 0.5}),
    aten.sym_size.int: ((X, 1), {}),
    aten.tanh.default: ((X,), {}),
    aten.transpose.int: ((X, 0, 1), {}),
    aten.type_as.default: ((X, Y), {}),
    aten.unbind.int: ((X, 1), {}),
    aten.unflatten.int: ((X, -1, [2, -1]), {}),
    aten.unsqueeze.default: ((X, 0), {}),
}


@pytest.mark.parametrize("operator", _PLAIN, ids=str)
def test_the_same_in_value(operator):
    args, kwargs = CALLS[operator]
    graph = fx.Graph()
    inputs = list({id(leaf): leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)}.values())
    nodes = {id(value): graph.placeholder(f"x{i}") for i, value in enumerate(inputs)}
    graph.output(graph.call_function(operator, pytree.tree_map(lambda a: nodes.get(id(a), a), args), kwargs))
    expected = fx.GraphModule({}, graph)(*inputs)
    use_plain_calls(graph)
    assert operator not in {node.target for node in graph.nodes}
    plain = fx.GraphModule({}, graph)
    for found in (plain(*inputs), torch.compile(plain, backend="eager", fullgraph=True)(*inputs)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_other_operators_stay():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(aten.transpose.int, (graph.call_function(aten.erf.default, (x,)), 0, 1)))
    use_plain_calls(graph)
    assert [node.target for node in graph.nodes][1:3] == [aten.erf.default, torch.transpose]
