"""Multiply-accumulates of one call, read off the shapes in the graph.

One multiply-accumulate is one MAC. Contractions are counted as they are executed; elementwise work, reductions,
gathers and Fourier transforms are not. A masked attention (causal, block mask, padding) is counted in full, as its
unfused form executes it. An operator that contracts, but has no formula here, raises; it never counts as nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from ..errors import UnsupportedError
from ..map_workspace import attention_map
from ..residual_linear import merged_weight, residual_linear
from .einsum import einsum_macs
from .sizes import elements, operands, operator_name, product, shape

Formula = Callable[[fx.Node], sympy.Expr]

_FORMULAS: dict[str, Formula] = {}

#: Operators of ATen that contract, but whose cost is not a product of sizes that the graph shows.
WITHOUT_FORMULA = frozenset({
    "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
    "quantized_lstm", "quantized_gru", "quantized_lstm_cell", "quantized_gru_cell", "quantized_rnn_relu_cell",
    "quantized_rnn_tanh_cell", "mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn", "_lstm_mps",
    "cdist", "_cdist_forward", "_euclidean_dist", "pdist", "_pdist_forward", "corrcoef", "cov", "chain_matmul",
    "linalg_multi_dot", "matrix_power", "linalg_matrix_power", "matrix_exp", "linalg_matrix_exp", "inverse",
    "linalg_inv", "linalg_inv_ex", "linalg_pinv", "pinverse", "det", "logdet", "slogdet", "linalg_det",
    "linalg_slogdet", "_linalg_det", "_linalg_slogdet", "linalg_solve", "linalg_solve_ex", "_linalg_solve_ex",
    "linalg_solve_triangular", "triangular_solve", "linalg_lu", "linalg_lu_factor", "linalg_lu_factor_ex",
    "linalg_lu_solve", "lu_solve", "linalg_ldl_factor", "linalg_ldl_factor_ex", "linalg_ldl_solve",
    "linalg_tensorinv", "linalg_tensorsolve", "linalg_lstsq", "linalg_matrix_rank", "linalg_cond", "cholesky",
    "cholesky_inverse", "cholesky_solve", "linalg_cholesky", "linalg_cholesky_ex", "qr", "linalg_qr", "geqrf",
    "orgqr", "ormqr", "linalg_householder_product", "svd", "linalg_svd", "_linalg_svd", "linalg_svdvals",
    "linalg_eig", "linalg_eigh", "_linalg_eigh", "linalg_eigvals", "linalg_eigvalsh", "_linalg_eigvals",
    "_native_multi_head_attention", "_triton_multi_head_attention", "_triton_scaled_dot_attention",
    "_transformer_encoder_layer_fwd", "_flash_attention_forward", "_flash_attention_forward_no_dropout_inplace",
    "_efficient_attention_forward", "_cudnn_attention_forward", "_scaled_grouped_mm", "_scaled_grouped_mm_v2",
    "_foreach_mm", "_trilinear", "_mixed_dtypes_linear", "_cslt_sparse_mm", "_sparse_mm", "_sparse_addmm", "smm",
    "hspmm", "sspaddmm", "sparse_sampled_addmm", "_sparse_sparse_matmul", "_sparse_semi_structured_mm",
    "_sparse_semi_structured_addmm", "_sparse_semi_structured_linear", "_dyn_quant_matmul_4bit",
    "fbgemm_linear_int8_weight", "fbgemm_linear_int8_weight_fp32_activation", "fbgemm_linear_fp16_weight",
    "fbgemm_linear_fp16_weight_fp32_activation", "_wrapped_quantized_linear_prepacked",
})  # fmt: skip

#: Higher-order operators that run a graph, found in their first graph argument, on the operands that follow it.
REGIONS = frozenset({
    "wrap_with_set_grad_enabled", "wrap_with_autocast", "wrap_activation_checkpoint", "tag_activation_checkpoint",
})  # fmt: skip


def macs_of(node: fx.Node) -> sympy.Expr:
    """The multiply-accumulates of one node, in the symbols of the capture.

    Arguments:
        node: any node whose inputs and value have ``meta["val"]``; a call of a module, or of a region with a graph of
            its own, counts as 0, since what it executes are nodes of that graph.

    Raises:
        UnsupportedError: for an operator that contracts without a formula, or that is of an unknown library.
    """
    name = operator_name(node)
    if node.op != "call_function" or node.target is operator.getitem or name in REGIONS:
        return sympy.Integer(0)
    found = _FORMULAS.get(name)
    if found is not None:
        return found(node)
    library, _, short = name.partition(".")
    if library in ("aten", "prims"):
        if short in WITHOUT_FORMULA or short.endswith("_backward"):
            raise _unsupported(node, name)
    elif _has_tensor(node.meta.get("val")):
        raise _unsupported(node, name or getattr(node.target, "__name__", str(node.target)))
    return sympy.Integer(0)


def formula(*names: str) -> Callable[[Formula], Formula]:
    """Declare what operators cost: for custom operators, whose work nobody else can know.

    Arguments:
        names: operators without overload, such as ``"mylib.fast_linear"``.

    Returns:
        A decorator for a function that takes a node and returns its multiply-accumulates.

    >>> @formula("mylib.outer_gather")
    ... def _(node):
    ...     return sympy.Integer(0)
    """

    def declare(function: Formula) -> Formula:
        _FORMULAS.update(dict.fromkeys(names, function))
        return function

    return declare


def _aten(*names: str) -> Callable[[Formula], Formula]:
    return formula(*(f"aten.{name}" for name in names))


def _unsupported(node: fx.Node, name: str) -> UnsupportedError:
    return UnsupportedError(
        f"The cost model has no formula for the operator {name} (node {node.name}), and does not count it as nothing. "
        f"Declare one with fxreuse.cost_model.formula('{name}'), or capture a part of the model that does not call it."
    )


def _has_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_has_tensor(item) for item in value)
    return isinstance(value, torch.Tensor)


@_aten("linear", "matmul", "linalg_matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "_int_mm", "_scaled_mm",
       "_scaled_mm_v2", "mkldnn_linear", "_weight_int8pack_mm", "_weight_int4pack_mm",
       "_weight_int4pack_mm_for_cpu")  # fmt: skip
def _product(node: fx.Node) -> sympy.Expr:
    """Every element of the result takes one product of length K, the last dimension of the left operand."""
    left = shape(operands(node)[0])
    return elements(node) * left[-1] if left else sympy.Integer(0)


@_aten("addmm", "_addmm_activation", "addmv", "baddbmm")
def _added_product(node: fx.Node) -> sympy.Expr:
    """As `_product`, after an addend that comes first."""
    return elements(node) * shape(operands(node)[1])[-1]


@_aten("addbmm")
def _summed_product(node: fx.Node) -> sympy.Expr:
    """A batch of products that are summed."""
    _, left, right = operands(node)[:3]
    return elements(left) * shape(right)[-1]


@_aten("linalg_vecdot")
def _vecdot(node: fx.Node) -> sympy.Expr:
    left, right, dim = operands(node)
    return elements(node) * max(shape(left)[dim], shape(right)[dim], key=lambda size: size != 1)


@_aten("tensordot")
def _tensordot(node: fx.Node) -> sympy.Expr:
    """A dimension of size 1 against a longer one stands for a sum over the longer one, which comes first."""
    left, right, left_dims, right_dims = operands(node)
    pairs = [(shape(left)[i], shape(right)[j]) for i, j in zip(left_dims, right_dims, strict=True)]
    return elements(node) * product(size for size, other in pairs if 1 not in (size, other))


@_aten("einsum")
def _einsum(node: fx.Node) -> sympy.Expr:
    equation, tensors, path = operands(node)
    return einsum_macs(equation, [shape(operand) for operand in tensors], path)


@formula("aten._grouped_mm", "transformers.grouped_mm_fallback")
def _grouped(node: fx.Node) -> sympy.Expr:
    """One product per group; a 2-D operand holds the groups side by side, so that its rows belong to one group each."""
    left, right = (shape(operand) for operand in operands(node)[:2])
    return product(left[-2:]) * right[-1] * (left[0] if len(left) == len(right) == 3 else 1)


@_aten("bilinear")
def _bilinear(node: fx.Node) -> sympy.Expr:
    """For each output feature the left input meets the weight, then the right input what came out."""
    left, right = (shape(operand)[-1] for operand in operands(node)[:2])
    return elements(node) * right * (left + 1)


@_aten("conv1d", "conv2d", "conv3d", "convolution", "_convolution", "_convolution_mode", "cudnn_convolution",
       "convolution_overrideable", "mkldnn_convolution", "miopen_convolution", "_conv_depthwise2d", "conv_depthwise3d",
       "miopen_depthwise_convolution", "cudnn_convolution_relu", "cudnn_convolution_add_relu", "thnn_conv2d",
       "slow_conv3d", "slow_conv_dilated2d", "slow_conv_dilated3d", "conv_transpose1d", "conv_transpose2d",
       "conv_transpose3d", "cudnn_convolution_transpose", "miopen_convolution_transpose", "slow_conv_transpose2d",
       "slow_conv_transpose3d")  # fmt: skip
def _convolution(node: fx.Node) -> sympy.Expr:
    """Each element of the result, or of the input where transposed, meets one slice of the weight.

    The slice holds the channels of one group and the whole kernel; what meets padding counts like the rest.
    """
    data, weight = operands(node)[:2]
    general = operator_name(node) in ("aten.convolution", "aten._convolution", "aten.convolution_overrideable")
    transposed = operands(node)[6] if general else "transpose" in operator_name(node)
    return elements(data if transposed else node) * product(shape(weight)[1:])


@_aten("conv_tbc")
def _convolution_tbc(node: fx.Node) -> sympy.Expr:
    """The weight is (kernel, input channels, output channels)."""
    return elements(node) * product(shape(operands(node)[1])[:2])


def _attention(node: fx.Node) -> sympy.Expr:
    """Scores and context: every (batch, query head, query, key) takes the query's width and the value's."""
    query, _, value = (shape(operand) for operand in operands(node)[:3])
    return product(attention_map_shape(node)) * (query[-1] + value[-1])


def attention_map_shape(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """The shape of the map inside a fused attention: batch, query heads, queries, keys."""
    return (*shape(node)[:-1], shape(operands(node)[1])[-2])


#: What computes the map of an attention whose map is stored.
STORED_MAP = f"{attention_map.__module__}.{attention_map.__qualname__}"


@formula(STORED_MAP)
def _stored_map(node: fx.Node) -> sympy.Expr:
    """Every (batch, head, query, key) takes the query's width."""
    return elements(node) * shape(operands(node)[0])[-1]


#: A product with a shared weight and its residuals, and the putting together of a weight with its residual.
RESIDUAL_LINEAR, MERGED_WEIGHT = (f"{one.__module__}.{one.__qualname__}" for one in (residual_linear, merged_weight))
formula(MERGED_WEIGHT)(_added_product)


@formula(RESIDUAL_LINEAR)
def _residual_linear(node: fx.Node) -> sympy.Expr:
    """Each row meets the weight, and A and B of every residual."""
    source, weight, _, residuals = operands(node)
    inputs, rows = shape(source)[-1], product(shape(source)[:-1])
    low_rank = [shape(b)[0] * (inputs + shape(b)[1]) for _, b, _ in residuals]
    return rows * sympy.Add(product(shape(weight)), *low_rank)


#: Operators that compute an attention whole, map and context.
FUSED_ATTENTION = frozenset({
    "aten.scaled_dot_product_attention", "aten._scaled_dot_product_attention_math",
    "aten._scaled_dot_product_attention_math_for_mps", "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu", "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention", "aten._scaled_dot_product_fused_attention_overrideable",
    "flex_attention",
})  # fmt: skip
formula(*FUSED_ATTENTION)(_attention)
