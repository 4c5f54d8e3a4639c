"""Example inputs for a model that came without any."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from ..errors import InputError
from .infer_config import huggingface_arguments, required
from .leftovers import nothing_left
from .samples import BATCH, LENGTH, OTHER_LENGTH, Sampler, length_beside

_TORCH_TRANSFORMERS: tuple[tuple[type[nn.Module], dict[str, int]], ...] = (
    (nn.Transformer, {"src": LENGTH, "tgt": OTHER_LENGTH}),
    (nn.TransformerEncoder, {"src": LENGTH}),
    (nn.TransformerEncoderLayer, {"src": LENGTH}),
    (nn.TransformerDecoder, {"tgt": OTHER_LENGTH, "memory": LENGTH}),
    (nn.TransformerDecoderLayer, {"tgt": OTHER_LENGTH, "memory": LENGTH}),
    (nn.MultiheadAttention, {"query": OTHER_LENGTH, "key": LENGTH, "value": LENGTH}),
)
_IMAGE_SIZES = (32, 64, 224)
_SAMPLES = 4000
_MOST_WIDTHS = 8


#: What a model raises on fake tensors where it asks for a value: that far, at least, its inputs were right.
_ASKS_FOR_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


class _Candidate(NamedTuple):
    """Arguments to try, and how a person would write them."""

    text: str
    arguments: dict[str, Any]


def infer_arguments(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments that the model runs on. See `fxreuse.frontend.inputs.infer`.

    >>> layer = nn.TransformerDecoderLayer(d_model=8, nhead=2, dim_feedforward=8)
    >>> {name: tuple(value.shape) for name, value in infer_arguments(layer).items()}
    {'tgt': (5, 2, 8), 'memory': (7, 2, 8)}
    """
    signature = signature_of(model)
    sampler = Sampler(model)
    known = huggingface_arguments(model, signature, sampler)
    if len(known) > 1:
        candidates = (_Candidate(_written(arguments), arguments) for arguments in known)
        return _first_that_runs(model, signature, candidates, known[-1], _ASKS_FOR_VALUES)
    if known:
        return known[0]
    arguments = _torch_arguments(model, signature, sampler)
    if arguments is not None:
        return arguments
    name = _single_argument(model, signature)
    return _first_that_runs(model, signature, _candidates(model, name, sampler), {name: None})


def signature_of(model: nn.Module) -> inspect.Signature:
    """The signature of the model's `forward`.

    Raises:
        InputError: it has none that can be read.

    >>> print(signature_of(nn.ReLU()))
    (input: torch.Tensor) -> torch.Tensor
    """
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{type(model).__name__}: the signature of its forward cannot be read ({error}); "
            "wrap it in a torch.nn.Module whose forward names its arguments"
        ) from error


def describe_forward(signature: inspect.Signature) -> str:
    """What `forward` takes, as a clause of a message.

    >>> describe_forward(signature_of(nn.TransformerEncoderLayer(8, 2, 8)))
    'forward takes (src, src_mask=None, src_key_padding_mask=None, is_causal=False)'
    """
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return f"forward takes {inspect.Signature(bare)}"


def _torch_arguments(model: nn.Module, signature: inspect.Signature, sampler: Sampler) -> dict[str, Any] | None:
    """For `torch.nn.Transformer` and its parts: the width and the order of axes are their attention's."""
    attention = next((part for part in model.modules() if isinstance(part, nn.MultiheadAttention)), None)
    if attention is None:
        return None
    for kind, lengths in _TORCH_TRANSFORMERS:
        if isinstance(model, kind) and set(lengths) <= set(signature.parameters):
            widths = {"key": attention.kdim, "value": attention.vdim}
            shapes = {name: _shape(attention, length, widths.get(name)) for name, length in lengths.items()}
            return {name: sampler.normal(*shape) for name, shape in shapes.items()}
    return None


def _shape(attention: nn.MultiheadAttention, length: int, width: int | None) -> tuple[int, int, int]:
    """The shape of a sequence that an attention takes, of a length unlike the widths."""
    width = attention.embed_dim if width is None else width
    while length in (attention.embed_dim, attention.kdim, attention.vdim):
        length += 4
    return (BATCH, length, width) if attention.batch_first else (length, BATCH, width)


def _single_argument(model: nn.Module, signature: inspect.Signature) -> str:
    """The name of the one argument that `forward` needs; of its first one where it needs none."""
    needed = required(signature)
    named = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not needed and named:
        main = str(getattr(model, "main_input_name", None))
        return main if main in signature.parameters else named[0]
    if len(needed) == 1:
        return needed[0]
    reason = f"forward needs {len(needed)} arguments" if needed else "forward names no argument"
    raise _error(model, signature, reason, dict.fromkeys(needed))


def _first_that_runs(
    model: nn.Module,
    signature: inspect.Signature,
    candidates: Iterable[_Candidate],
    needed: Mapping[str, Tensor | None],
    right: tuple[type[Exception], ...] = (),
) -> dict[str, Any]:
    """The first candidate that a fake copy of the model, in evaluation mode, runs on, or raises one of ``right``.

    Raises:
        InputError: there is none; it sketches a value for each argument that is needed, like the one given here.
    """
    if any(nn.parameter.is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise InputError(
            f"no example inputs can be inferred for {type(model).__name__}: some of its parameters have no size yet; "
            "call the model once, on inputs as it will get them"
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        twin = _fake_copy(model, mode)
    except Exception as error:
        raise _error(model, signature, f"it cannot be copied ({_first_line(error)})", needed) from error
    failures = []
    for candidate in candidates:
        try:
            with nothing_left(twin), mode, torch.no_grad(), _quiet():
                twin(**{name: mode.from_tensor(value) for name, value in candidate.arguments.items()})
        except right:
            return candidate.arguments
        except Exception as error:
            failures.append(f"{candidate.text} fails with {_first_line(error)}")
        else:
            return candidate.arguments
    told = "; ".join(failures[:1] if len(needed) == 1 else failures)
    raise _error(model, signature, f"tried {len(failures)} inputs, {told}", needed)


def _fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy in evaluation mode with fake tensors, so that nothing the copy does reaches the model."""
    held = [value for part in model.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *held]
    memo: dict[int, Any] = {id(t): mode.from_tensor(t) for t in tensors}
    return copy.deepcopy(model, memo).eval()


def _candidates(model: nn.Module, name: str, sampler: Sampler) -> Iterator[_Candidate]:
    """Hidden states, token ids, images, waveforms, frames with channels first, plain features."""

    def normal(*shape: int) -> _Candidate:
        return _Candidate(f"torch.randn{shape}", {name: sampler.normal(*shape)})

    widths = _widths(model)
    for width in widths:
        yield normal(BATCH, length_beside(width), width)
    vocabulary = _vocabulary(model)
    ids = sampler.ids(vocabulary, _paddings(model), BATCH, LENGTH)
    yield _Candidate(f"torch.randint({vocabulary}, ({BATCH}, {LENGTH}))", {name: ids})
    channels = _first(model, nn.Conv2d, "in_channels") or 3
    for size in _IMAGE_SIZES:
        yield normal(BATCH, channels, size, size)
    yield normal(BATCH, _SAMPLES)
    yield normal(BATCH, _first(model, nn.Conv1d, "in_channels") or 1, _SAMPLES)
    for width in widths:
        yield normal(BATCH, width)


def _written(arguments: dict[str, Any]) -> str:
    """Arguments in short: their names and sizes."""
    return ", ".join(f"{name} {'×'.join(map(str, value.shape))}" for name, value in arguments.items())


def _widths(model: nn.Module) -> list[int]:
    """Widths that the model's input may have, likely ones first, each once."""
    linears = [part.in_features for part in model.modules() if isinstance(part, nn.Linear)]
    norms = [part.normalized_shape[-1] for part in model.modules() if isinstance(part, (nn.LayerNorm, nn.RMSNorm))]
    embeddings = [part.embedding_dim for part in model.modules() if isinstance(part, nn.Embedding)]
    others = [parameter.shape[-1] for parameter in model.parameters() if parameter.ndim]
    return list(dict.fromkeys([*linears, *norms, *embeddings, *others, 64]))[:_MOST_WIDTHS]


def _vocabulary(model: nn.Module) -> int:
    """A number of ids that every table which could be meant has; tables of 2 are token types."""
    sizes = [part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)]
    return min((size for size in sizes if size > 2), default=32)


def _paddings(model: nn.Module) -> set[int]:
    return {
        part.padding_idx for part in model.modules() if isinstance(part, nn.Embedding) and part.padding_idx is not None
    }


def _first(model: nn.Module, kind: type[nn.Module], attribute: str) -> int | None:
    return next((getattr(part, attribute) for part in model.modules() if isinstance(part, kind)), None)


def _error(
    model: nn.Module, signature: inspect.Signature, reason: str, needed: Mapping[str, Tensor | None]
) -> InputError:
    """What stands in the way, and what a person could pass for each argument that is needed."""
    sketch = ", ".join(f"{name!r}: {_sketch(model, name, value)}" for name, value in needed.items())
    remedy = f"example_inputs={{{sketch}}}" if needed else "example_inputs=(tensor, …), a tuple of positional arguments"
    return InputError(
        f"no example inputs can be inferred for {type(model).__name__}: {reason}; "
        f"pass {remedy}; {describe_forward(signature)}"
    )


def _sketch(model: nn.Module, name: str, value: Tensor | None) -> str:
    """A value that fits the name of an argument, as a person would write it; of the sizes of one that is known."""
    if value is not None and value.is_floating_point():
        return f"torch.randn{tuple(value.shape)}"
    if "grid_thw" in name:
        return "torch.tensor([[1, 4, 4]])"
    if "mask" in name:
        return f"torch.ones({BATCH}, {LENGTH}, dtype=torch.bool)"
    if "len" in name:
        return f"torch.tensor([{LENGTH}, {OTHER_LENGTH}])"
    if any(part in name for part in ("ids", "idx", "token")):
        return f"torch.randint({_vocabulary(model)}, ({BATCH}, {LENGTH}))"
    if any(part in name for part in ("image", "img", "pixel")):
        return f"torch.randn({BATCH}, {_first(model, nn.Conv2d, 'in_channels') or 3}, 224, 224)"
    width = _widths(model)[0]
    return f"torch.randn({BATCH}, {length_beside(width)}, {width})"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of operators that refuse fake tensors: to be refused is what candidates are tried for."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
