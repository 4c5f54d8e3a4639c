"""What a device runs for one operation at given sizes: one kernel or a few, each of a family that has a rate."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from .aliasing import contiguous, strides
from .attention_blocks import KEY_BLOCK, visible_part
from .macs import RESIDUAL_LINEAR
from .operations import Access, Operation
from .sizes import operands, product, shape, tensor

#: A size as a number.
At = Callable[[sympy.Expr], int]


# Operators that take longer than plain arithmetic, by the one among the measured ones that they are like.
_FAMILIES = {
    "gelu": "gelu", "erf": "gelu",
    "silu": "silu", "sigmoid": "silu", "exp": "silu", "glu": "silu", "softplus": "silu", "log_sigmoid": "silu",
    "mish": "tanh", "tanh": "tanh", "sin": "tanh", "cos": "tanh", "log": "tanh", "log1p": "tanh", "expm1": "tanh",
    "elu": "silu", "selu": "silu", "erfinv": "tanh", "atan": "tanh", "asin": "tanh", "acos": "tanh", "atan2": "tanh",
    "group_norm": "group_norm", "native_group_norm": "group_norm", "instance_norm": "group_norm",
    "batch_norm": "batch_norm", "native_batch_norm": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
}  # fmt: skip
_KINDS = {"softmax": "softmax", "normalisation": "layer_norm", "map": "softmax", "attention": "softmax"}
_MODULES: dict[type, str] = {
    torch.nn.GELU: "gelu", torch.nn.SiLU: "silu", torch.nn.Sigmoid: "silu", torch.nn.Tanh: "tanh",
    torch.nn.BatchNorm1d: "batch_norm", torch.nn.BatchNorm2d: "batch_norm", torch.nn.BatchNorm3d: "batch_norm",
    torch.nn.SyncBatchNorm: "batch_norm", torch.nn.GroupNorm: "group_norm",
}  # fmt: skip
# Kinds whose work a compiler merges with that of their neighbours.
_FUSIBLE = frozenset({"elementwise", "normalisation", "copy", "factory", "gather", "softmax", "reduction"})
# Operators that fill their result with a number and copy their input into it.
_FILLED_FIRST = frozenset({"aten.pad", "aten.constant_pad_nd"})
# Operators that want their input row by row in memory, and copy it where it is not.
_WANTS_ROWS = frozenset({"linear", "convolution", "normalisation", "softmax"})


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Work of one family, in numbers.

    Attributes:
        operation: what it is for.
        family: a key of `Device.products` or `Device.elements`, or ``"view"`` for none.
        product: batch, m, n and k of a matrix product; None of anything else.
        elements: elements that it goes through beside a product, in the family's time per element.
        scores: scores of a fused attention; ``masked`` where it reads a mask for them.
        reads: storages and bytes that it reads.
        writes: storages and bytes that it writes.
        kept: whether what it writes is memory that was there before: it works in place or in a workspace.
        dispatch: the kind of overhead that it has; empty for a part of an operation whose overhead is counted before.
        fusible: whether a compiler merges it with its neighbours.
    """

    operation: Operation
    family: str
    product: tuple[int, int, int, int] | None = None
    elements: int = 0
    scores: int = 0
    masked: bool = False
    reads: tuple[tuple[int, int], ...] = ()
    writes: tuple[tuple[int, int], ...] = ()
    kept: bool = False
    dispatch: str = ""
    fusible: bool = False
    computed_in: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that its products are computed in."""
        return self.computed_in or self.operation.dtype


def kernels_of(operation: Operation, at: At, eager_cpu: bool = True) -> list[Kernel]:
    """The kernels of an operation.

    Arguments:
        operation: any, with its node.
        at: gives the number for a size.
        eager_cpu: whether ATen's own kernels for a CPU run it, which skip and copy in ways of their own.
    """
    if operation.view:
        return [Kernel(operation, "view", dispatch="module" if operation.step.node.op == "call_module" else "view")]
    made = list(_MAKERS.get(operation.kind, _of_elements)(operation, at, eager_cpu))
    copied = _copied_first(operation, at) if eager_cpu and operation.kind in _WANTS_ROWS else []
    return [*copied, *made]


def _linear(operation: Operation, at: At, eager_cpu: bool) -> Iterator[Kernel]:
    """A product with one matrix of weights, whatever the batch."""
    if operation.op == RESIDUAL_LINEAR:
        yield from _residual_linear(operation, at)
        return
    batch, m, n, k = _product_sizes(operation, at)
    yield _base(operation, at, "linear", product=(1, batch * m, n, k), dispatch="linear")


def _residual_linear(operation: Operation, at: At) -> Iterator[Kernel]:
    """`fxreuse.residual_linear`: the product with the weight, and for each residual three more into the same result."""
    source, weight, bias, residuals = operands(operation.step.node)
    *outer, inputs = map(at, shape(source))
    rows, outputs = math.prod(outer), at(operation.shapes[-1][-1])
    sizes = {access.storage: at(access.bytes) for access in operation.reads}
    writes = _accesses(operation.writes, at)

    def read(*nodes: fx.Node | None) -> tuple[tuple[int, int], ...]:
        storages = [operation.step.values[node].storage for node in nodes if node is not None]
        return tuple((storage, sizes[storage]) for storage in storages)

    def kernel(family: str, reads: tuple[tuple[int, int], ...], dispatch: str, **rest: Any) -> Kernel:
        return Kernel(operation, family, reads=reads, dispatch=dispatch, **rest)

    product = (1, rows, outputs, inputs)
    yield kernel("linear", read(source, weight, bias), "linear", product=product, writes=writes)
    for a, b, d in residuals:
        rank, count = map(at, shape(b))
        yield kernel("linear", read(source, a), "linear", product=(1, rows, rank, inputs))
        yield kernel("linear", read(b), "linear", product=(1, rows, count, rank), writes=writes, kept=True)
        if d is not None:
            elements = rows * at(shape(d)[0])
            yield kernel("add", read(source, d), "element", elements=elements, writes=writes, kept=True)


def _product(operation: Operation, at: At, eager_cpu: bool) -> Iterator[Kernel]:
    for operand in _factors(operation.step.node) if eager_cpu else ():
        yield from _merged_batch(operation, operand, at)
    yield _base(operation, at, "batched", product=_product_sizes(operation, at), dispatch="batched")


def _convolution(operation: Operation, at: At, eager_cpu: bool) -> Iterator[Kernel]:
    source, *parameters, result = operation.shapes
    weight = max(parameters, key=len)
    groups = max(1, at(source[1]) // max(1, at(weight[1])))
    channels = at(result[1])
    positions = math.prod(map(at, result)) // max(1, channels)
    inner = at(operation.macs) // max(1, positions * channels)
    depthwise = groups > 1 and at(weight[1]) == 1
    sizes = (groups, positions, max(1, channels // groups), inner)
    family = "depthwise" if depthwise else "convolution"
    made = _base(operation, at, family, product=sizes, dispatch="convolution")
    if eager_cpu:  # oneDNN blocks the channels: it works on a copy of the input, and on a result that it copies, too
        item = operation.dtype.itemsize
        blocked = (math.prod(map(at, source)) * item, channels * positions * item)
        scratch = tuple((-2 * id(operation) - place, size) for place, size in enumerate(blocked, 1))
        made = dataclasses.replace(made, writes=(*scratch, *made.writes))
    yield made


def _attention(operation: Operation, at: At, eager_cpu: bool) -> Iterator[Kernel]:
    if operation.macs == 0:  # a part of a fused attention's gradient, or its random state
        yield from _of_elements(operation, at, eager_cpu)
        return
    heads, queries, keys, width, values = _attention_sizes(operation, at)
    if eager_cpu and width != values:
        yield from _unfused(operation, at, (heads, queries, keys, width, values))
        return
    given = operands(operation.step.node)
    mask = given[3] if len(given) > 3 and isinstance(given[3], fx.Node) else None
    if len(given) > 5 and given[5] is True:
        keys = round(keys * visible_part(keys, KEY_BLOCK if eager_cpu else 1))
    if eager_cpu and mask is not None and tensor(mask).dtype == torch.bool:
        yield Kernel(operation, "add", elements=at(product(_shape_of(operation, mask))))
    yield _base(
        operation,
        at,
        "attention",
        product=(heads, queries, keys, width + values),
        scores=heads * queries * keys,
        masked=mask is not None,
        dispatch="attention",
    )


def _attention_sizes(operation: Operation, at: At) -> tuple[int, int, int, int, int]:
    """Batch times heads, queries, keys, and the widths of keys and values of an attention."""
    *outer, values = map(at, operation.shapes[-1])
    rows = math.prod(outer)
    keys = at(operation.elements) // max(1, rows)
    queries = outer[-1]
    both = at(operation.macs) // max(1, rows * keys)
    return rows // max(1, queries), queries, keys, both - values, values


def _unfused(operation: Operation, at: At, sizes: tuple[int, int, int, int, int]) -> Iterator[Kernel]:
    """Fused attention of a CPU where keys and values differ in width: two products and a softmax, maps in memory."""
    heads, queries, keys, width, values = sizes
    count, item = heads * queries * keys, operation.dtype.itemsize
    scores, probs = -2 * id(operation) - 1, -2 * id(operation) - 2
    reads = _accesses(operation.reads, at)
    yield Kernel(
        operation,
        "batched",
        product=(heads, queries, keys, width),
        reads=reads,
        writes=((scores, count * item),),
        dispatch="attention",
    )
    yield Kernel(operation, "softmax", elements=count, reads=((scores, count * item),), writes=((probs, count * item),))
    yield Kernel(
        operation,
        "batched",
        product=(heads, queries, values, keys),
        reads=((probs, count * item), *reads),
        writes=_accesses(operation.writes, at),
    )


def _map(operation: Operation, at: At, eager_cpu: bool) -> Iterator[Kernel]:
    """`fxreuse.map_workspace.attention_map`: scores into kept storage, softmax in place."""
    *outer, queries, keys = map(at, operation.shapes[-1])
    heads = math.prod(outer)
    count = heads * queries * keys
    width = at(operation.macs) // max(1, count)
    reads, writes = _accesses(operation.reads, at), _accesses(operation.writes, at)
    scores_dtype = tensor(operation.step.node.all_input_nodes[0]).dtype
    narrow = operation.dtype != scores_dtype
    scores = () if narrow else writes
    yield Kernel(operation, "add", elements=heads * queries * width, reads=reads[:1], dispatch="map")
    if len(operation.reads) > 2 or operation.step.node.args[3] is True:
        yield Kernel(operation, "add", elements=count, reads=reads[2:], writes=scores, kept=True, fusible=True)
    yield Kernel(
        operation,
        "batched",
        (heads, queries, keys, width),
        reads=reads[:2],
        writes=scores,
        kept=True,
        computed_in=scores_dtype,
    )
    yield Kernel(operation, "softmax", elements=count, reads=scores, writes=scores, kept=True, fusible=True)
    if narrow:
        yield Kernel(operation, "add", elements=count, writes=writes, kept=True, fusible=True)


def _of_elements(operation: Operation, at: At, eager_cpu: bool) -> Iterator[Kernel]:
    filled = eager_cpu and operation.op in _FILLED_FIRST
    if filled:
        writes = _accesses(operation.writes, at)
        yield Kernel(operation, "add", elements=at(operation.elements), writes=writes, dispatch="element")
    made = _base(
        operation,
        at,
        _family(operation, eager_cpu),
        elements=at(operation.elements),
        dispatch=_call(operation),
    )
    yield dataclasses.replace(made, kept=True) if filled else made


def _call(operation: Operation) -> str:
    """The kind of call that an operator which is no product is."""
    if operation.step.leaf is None or operation.kind != "normalisation":
        return "element"
    return "batch norm" if _MODULES.get(type(operation.step.leaf)) == "batch_norm" else "norm"


_MAKERS: dict[str, Callable[[Operation, At, bool], Iterator[Kernel]]] = {
    "linear": _linear,
    "product": _product,
    "convolution": _convolution,
    "attention": _attention,
    "map": _map,
}


def _base(operation: Operation, at: At, family: str, **rest: object) -> Kernel:
    """A kernel that reads and writes what its operation does."""
    reads, writes = _accesses(operation.reads, at), _accesses(operation.writes, at)
    read = {storage for storage, _ in reads}
    kept = bool(writes) and all(storage in read for storage, _ in writes)
    fusible = operation.kind in _FUSIBLE
    return Kernel(operation, family, reads=reads, writes=writes, kept=kept, fusible=fusible, **rest)  # type: ignore[arg-type]


def _accesses(accesses: Sequence[Access], at: At) -> tuple[tuple[int, int], ...]:
    return tuple((access.storage, at(access.bytes)) for access in accesses)


def _product_sizes(operation: Operation, at: At) -> tuple[int, int, int, int]:
    """Batch, m, n and k of a product, of its result's shape and its multiply-accumulates."""
    sizes = [at(size) for size in operation.shapes[-1]]
    *outer, m, n = [1, 1, *sizes][-max(2, len(sizes)) :]
    batch = math.prod(outer)
    return batch, m, n, at(operation.macs) // max(1, batch * m * n)


def _family(operation: Operation, eager_cpu: bool) -> str:
    """The measured operator that an operation is like."""
    if eager_cpu and operation.kind in ("elementwise", "copy") and _jumps(operation.step.node):
        return "strided"
    if operation.step.node.op == "call_module":
        name = operation.op.partition(".")[2]
        leaf = _MODULES.get(type(operation.step.leaf))
        return leaf or _FAMILIES.get(name) or _KINDS.get(operation.kind, "add")
    name = operation.op.partition(".")[2]
    if name == "gelu" and "tanh" in operation.step.node.kwargs.values():
        return "tanh"
    return _FAMILIES.get(name) or _KINDS.get(operation.kind, "add")


def _jumps(node: fx.Node) -> bool:
    """Whether an operand of the result's shape is read across the order in which the result is written."""
    sizes, result = shape(node), strides(node)
    inner = next((dim for dim, step in enumerate(result) if step == 1 and sizes[dim] != 1), None)
    if inner is None:
        return False
    read = [operand for operand in node.all_input_nodes if isinstance(operand.meta.get("val"), torch.Tensor)]
    return any(shape(operand) == sizes and strides(operand)[inner] not in (0, 1) for operand in read)


def _copied_first(operation: Operation, at: At) -> list[Kernel]:
    """The copy of an input that does not lie in memory row by row."""
    source = operation.step.node.all_input_nodes[0]
    sizes, steps = shape(source), strides(source)
    if not sizes or steps == contiguous(sizes):
        return []
    if steps[-1] == 1 and operation.kind != "convolution":
        return []
    return [_copy(operation, source, "strided", at)]


def _merged_batch(operation: Operation, operand: fx.Node, at: At) -> Iterator[Kernel]:
    """The copy of an operand whose outer dimensions, batch and heads, do not lie in memory like one."""
    numbers = map(at, _shape_of(operation, operand)[:-2])
    outer = list(zip(numbers, shape(operand)[:-2], strides(operand)[:-2], strict=True))
    together = [(size, step) for number, size, step in outer if number != 1]
    if any(step != inner * size for (_, step), (size, inner) in itertools.pairwise(together)):
        yield _copy(operation, operand, "add", at)


def _copy(operation: Operation, operand: fx.Node, family: str, at: At) -> Kernel:
    """The copy of an operand into a tensor that only this operation reads."""
    place = operation.step.node.all_input_nodes.index(operand)
    count = at(product(_shape_of(operation, operand)))
    written = (-1 - len(operation.step.node.all_input_nodes) * id(operation) - place, count * operation.dtype.itemsize)
    return Kernel(operation, family, elements=count, writes=(written,), fusible=True)


def _factors(node: fx.Node) -> list[fx.Node]:
    """The operands of a batch of products."""
    return [operand for operand in operands(node) if isinstance(operand, fx.Node)][-2:]


def _shape_of(operation: Operation, operand: fx.Node) -> tuple[sympy.Expr, ...]:
    """The shape of an operand in the symbols of the operation."""
    tensors = [node for node in operation.step.node.all_input_nodes if isinstance(node.meta["val"], torch.Tensor)]
    return operation.shapes[tensors.index(operand)]
