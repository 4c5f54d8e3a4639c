"""What kind of work an operator does."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .macs import FUSED_ATTENTION, STORED_MAP
from .maps import SOFTMAX

#: The kinds of operations, in the order of a table.
KINDS = (
    "linear", "product", "convolution", "attention", "map", "softmax", "normalisation", "elementwise", "reduction",
    "gather", "copy", "factory", "view", "call",
)  # fmt: skip

_NAMES: dict[str, Iterable[str]] = {
    "convolution": {
        "conv1d", "conv2d", "conv3d", "convolution", "_convolution", "_convolution_mode", "conv_transpose1d",
        "conv_transpose2d", "conv_transpose3d", "conv_tbc", "_conv_depthwise2d", "conv_depthwise3d", "thnn_conv2d",
        "mkldnn_convolution", "cudnn_convolution", "slow_conv3d", "slow_conv_dilated2d", "slow_conv_dilated3d",
    },
    "softmax": {*(name.removeprefix("aten.") for name in SOFTMAX), "log_softmax", "_log_softmax"},
    "normalisation": {
        "layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "batch_norm", "native_batch_norm",
        "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "instance_norm", "rms_norm",
        "_fused_rms_norm", "_batch_norm_with_update", "_batch_norm_impl_index",
    },
    "reduction": {
        "sum", "nansum", "mean", "nanmean", "prod", "amax", "amin", "aminmax", "max", "min", "argmax", "argmin", "var",
        "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "linalg_norm", "logsumexp", "all", "any", "cumsum",
        "cumprod", "cummax", "cummin", "logcumsumexp", "topk", "sort", "argsort", "median", "count_nonzero", "nonzero",
        "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices",
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool1d",
    },
    "gather": {
        "embedding", "embedding_bag", "index", "index_select", "gather", "take", "take_along_dim", "_unsafe_index",
        "masked_select", "one_hot",
    },
    "copy": {
        "cat", "concat", "concatenate", "stack", "hstack", "vstack", "clone", "contiguous", "copy", "_to_copy", "to",
        "type_as", "reshape", "reshape_as", "flatten", "ravel", "repeat", "repeat_interleave", "tile", "pad",
        "constant_pad_nd", "roll", "flip", "rot90", "tril", "triu", "index_put", "index_copy", "index_add", "scatter",
        "scatter_add", "slice_scatter", "select_scatter", "expand_copy", "view_copy", "im2col", "col2im",
        "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold_copy", "lift_fresh_copy", "meshgrid",
        "reflection_pad1d", "replication_pad1d", "block_diag", "diag_embed",
    },
    "factory": {
        "arange", "linspace", "zeros", "ones", "full", "empty", "eye", "scalar_tensor", "zeros_like", "ones_like",
        "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty", "rand", "randn", "rand_like",
        "randn_like", "tril_indices", "triu_indices",
    },
}  # fmt: skip
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names}

_LEAVES: dict[str, tuple[type[torch.nn.Module], ...]] = {
    "linear": (torch.nn.Linear,),
    "convolution": (torch.nn.modules.conv._ConvNd,),
    "gather": (torch.nn.Embedding,),
    "normalisation": (
        torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm, torch.nn.modules.batchnorm._NormBase,
    ),
}  # fmt: skip


def kind_of_operator(name: str, contracts: bool, weighs: bool) -> str:
    """The kind of an operator that is no view.

    Arguments:
        name: the operator, without overload: ``"aten.linear"``.
        contracts: whether it has multiply-accumulates.
        weighs: whether it reads a parameter.

    >>> kind_of_operator("aten.matmul", True, False), kind_of_operator("aten.gelu", False, False)
    ('product', 'elementwise')
    """
    if name in FUSED_ATTENTION:
        return "attention"
    if name == STORED_MAP:
        return "map"
    kind = _KINDS.get(name.partition(".")[2])
    if kind is not None:
        return kind
    if contracts:
        return "linear" if weighs else "product"
    return "elementwise"


def kind_of_leaf(leaf: torch.nn.Module) -> str:
    """The kind of a module that is called whole.

    >>> kind_of_leaf(torch.nn.LayerNorm(4)), kind_of_leaf(torch.nn.GELU())
    ('normalisation', 'elementwise')
    """
    for kind, classes in _LEAVES.items():
        if isinstance(leaf, classes):
            return kind
    return "elementwise"
