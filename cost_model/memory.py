"""Peak activation memory: every storage followed from the operator that makes it to the last reference to it.

A model is run with fake tensors, which have sizes and no data, so that views, work in place, what a caller's variables
keep alive and what autograd saves are as they are in the real run. Positions and the like, integers that follow from
sizes alone, have their values, for the branches that a model takes on them. What a CPU kernel allocates for itself,
which is on no graph, comes from the formulas at the end.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..map_workspace import IDLE_BLOCKS, SMALLEST
from .attention_blocks import KEY_BLOCK, query_block
from .integers import Integers
from .map_memory import before_scores, beside_scores, bytes_of, scores_bytes

_ATEN = torch.ops.aten
_MAP = torch.ops.fxreuse.map_in_workspace.default
# Of convolutions on a CPU: the batch from which on one of a single tap goes to oneDNN; the elements of an input, and
# the width of a kernel, above which one does; and the channels of an image that oneDNN takes as it is.
_MANY, _UNFOLDED, _LARGE_KERNEL, _FEW_CHANNELS = 16, 20480, 3, 3


def peak_bytes(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool = False
) -> int:
    """The most bytes of tensors that a call holds at a time, above parameters, buffers and inputs.

    On a CPU, eager; on accelerators kernels keep other things for themselves. Nothing is computed, and no weight or
    result takes memory.

    Arguments:
        model: any module, also on the meta device. Its tensors are stood in for while it runs.
        args: positional arguments; of tensors only the sizes and dtypes count.
        kwargs: keyword arguments.
        training: forward and backward in training mode, with the gradients of all parameters, which are there at the
            end; else the forward of evaluation mode without gradients.

    Returns:
        Bytes. The outputs count; of a training step, so do the gradients.

    >>> peak_bytes(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)), (torch.ones(2, 8),), {})
    192
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with fakes:
        names = [*model.named_parameters(), *model.named_buffers()]
        tensors = {name: _stand_in(tensor) for name, tensor in names}
        given = pytree.tree_map_only(torch.Tensor, _stand_in, (args, dict(kwargs)))
    liveness, linear = _Liveness(fakes), _BiasInPlace()
    with _mode(model, training), _separate_operators(), torch.set_grad_enabled(training), fakes, liveness, linear:
        result = torch.func.functional_call(model, tensors, *given, strict=False)
        if training:
            _backward(result)
        del result
    return liveness.peak


def _stand_in(tensor: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    """A fake tensor of the same layout, on the CPU as a rule."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return made.requires_grad_() if tensor.requires_grad else made


def _backward(result: Any) -> None:
    outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    torch.autograd.backward([output.sum() for output in outputs])


@contextlib.contextmanager
def _mode(model: torch.nn.Module, training: bool) -> Iterator[None]:
    """All modules in one mode for the time being."""
    before = {module: module.training for module in model.modules()}
    for module in before:
        module.training = training
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextlib.contextmanager
def _separate_operators() -> Iterator[None]:
    """Without the fused inference path of `torch.nn.TransformerEncoderLayer`, which hides what it allocates."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _BiasInPlace(TorchFunctionMode):
    """Adds the bias of a linear layer to the product in place, as torch does where no mode looks at it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.nn.functional.linear, _ATEN.linear.default):
            return _linear(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(linear: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    flat = input.dim() == 2 or (input.dim() == 3 and input.is_contiguous())
    return linear(input, weight, bias) if bias is None or flat else linear(input, weight).add_(bias)


class _Liveness(TorchDispatchMode):
    """Sums the bytes of all storages that operators have made and that something still refers to."""

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self._fakes = fakes
        self._known: set[int] = set()
        self._workspace = _Workspace()
        self._integers = Integers()
        self._held = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = args, dict(kwargs or {})
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._outside, given)
        if func is _ATEN.rand.default and not args[0]:
            return torch.tensor(1.0)  # LayerDrop draws it, and keeps the layer
        try:
            result = self._integers.result(func, given, (args, kwargs))
        except RuntimeError:
            if func._schema.is_mutable:
                raise
            result = _elsewhere(func, args, kwargs)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage(), func is _MAP)
        self._reach(temporary_bytes(func, args, result))
        if func is _MAP and (scores := scores_bytes(args, result)):
            self._use_scores(scores, beside_scores(args, result))
        return result

    def _reach(self, more: int) -> None:
        """The peak is what is held and this many bytes more, where that is the most so far."""
        self.peak = max(self.peak, self._held + self._workspace.bytes + more)

    def _use_scores(self, scores: int, beside: int) -> None:
        """Scores are used for the time of an operator: in kept storage where they are of that size."""
        if scores < SMALLEST:
            self._reach(scores + beside)
            return
        block = self._workspace.lend(scores)
        self._reach(beside)
        self._workspace.take_back(block)

    def _outside(self, tensor: torch.Tensor) -> torch.Tensor:
        """An operand as a fake tensor; one that no operator has made was there before, and does not count."""
        fake = tensor if isinstance(tensor, FakeTensor) else self._fakes.from_tensor(tensor)
        storage = fake.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            weakref.finalize(storage, self._known.discard, storage._cdata)
        return fake

    def _follow(self, storage: torch.UntypedStorage, workspace: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        if workspace and size >= SMALLEST:
            weakref.finalize(storage, self._give_back, key, self._workspace.lend(size))
        else:
            self._held += size
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._held -= size

    def _give_back(self, key: int, block: int) -> None:
        self._known.discard(key)
        self._workspace.take_back(block)


def _elsewhere(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result of an operator that a CPU refuses, in a graph that was captured on another device."""
    given = pytree.tree_map_only(torch.Tensor, lambda tensor: _stand_in(tensor, "meta"), (args, dict(kwargs)))
    return pytree.tree_map_only(torch.Tensor, _stand_in, func(*given[0], **given[1]))


class _Workspace:
    """The blocks that attention maps are written into, as `fxreuse.map_workspace` keeps them."""

    def __init__(self) -> None:
        self.bytes = 0
        self._idle: list[int] = []

    def lend(self, size: int) -> int:
        """The size of the block that a map of this size gets."""
        block = min((idle for idle in self._idle if idle >= size), default=None)
        if block is None:
            self.bytes += size - sum(self._idle)
            self._idle = []
            return size
        self._idle.remove(block)
        return block

    def take_back(self, block: int) -> None:
        """A map is not used any more."""
        self._idle.append(block)
        self.bytes -= sum(self._idle[:-IDLE_BLOCKS])
        self._idle = self._idle[-IDLE_BLOCKS:]


def temporary_bytes(func: Any, args: tuple[Any, ...], result: Any) -> int:
    """What the CPU kernel of an operator allocates beside its result, as far as it is of any size.

    The fused attention has a block of scores, and of results, for each thread (``FlashAttentionKernel.cpp`` of torch);
    its backward a block of the map and one of the map's gradient. Of a stored map see `map_memory`. The backward of a
    convolution has its input and the gradient of its result in blocks of channels; what else oneDNN keeps for a grouped
    one is not counted.
    """
    if func is _ATEN.convolution.default:
        return _convolution_bytes(args, result)
    if func is _ATEN.convolution_backward.default:
        return bytes_of(args[0]) + bytes_of(args[1])
    if func is _ATEN._scaled_dot_product_flash_attention_for_cpu.default:
        return _flash_bytes(args[0], args[1])
    if func is _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return _flash_backward_bytes(args[1], args[2])
    return before_scores(args, result) if func is _MAP else 0


def _convolution_bytes(args: tuple[Any, ...], result: torch.Tensor) -> int:
    """What a convolution allocates beside its result.

    oneDNN lays input, weight and result out in blocks of channels: first the copies of the former two are there, then
    the result twice; an image of few channels stays as it is. An image with its channels last stays so, and its weight
    is made so. Small convolutions unfold their input into columns, and those of one tap do nothing of the kind on one
    thread (``ConvParams::use_mkldnn`` of torch).
    """
    data, weight, _, stride, _, dilation = args[:6]
    last = suggest_memory_format(data) is torch.channels_last
    if last:
        copied = 0 if weight.is_contiguous(memory_format=torch.channels_last) else bytes_of(weight)
    else:
        copied = 0 if data.is_contiguous() else bytes_of(data)
    taps = weight.shape[2:].numel()
    plain = taps == 1 and set(stride) == set(dilation) == {1} and data.shape[0] < _MANY
    if plain and torch.get_num_threads() == 1:
        return copied
    wide = weight.ndim > 3 and min(weight.shape[2:]) > _LARGE_KERNEL
    large = data.shape[0] > 1 or data.numel() > _UNFOLDED or args[8] > 1 or wide
    if data.dtype == torch.float64 or not large:
        return copied + result.shape[2:].numel() * data.shape[0] * weight.shape[1] * taps * data.element_size()
    if last:
        return copied + bytes_of(weight)
    blocked = bytes_of(data) if data.shape[1] > _FEW_CHANNELS else 0
    return copied + max(blocked + bytes_of(weight), bytes_of(result))


def _flash_bytes(query: torch.Tensor, key: torch.Tensor) -> int:
    queries, keys, width = query.shape[-2], key.shape[-2], query.shape[-1]
    rows = min(query_block(queries), queries)
    per_thread = rows * (min(KEY_BLOCK, keys) + 2 + width)
    return torch.get_num_threads() * per_thread * max(query.element_size(), 4)


def _flash_backward_bytes(query: torch.Tensor, key: torch.Tensor) -> int:
    queries, keys = query.shape[-2], key.shape[-2]
    rows = min(query_block(queries), queries)
    return torch.get_num_threads() * rows * (2 * min(KEY_BLOCK, keys) + 1) * max(query.element_size(), 4)
