"""What a program executes, operator by operator: work, bytes read and written, and where it belongs.

Every figure is an expression in the sizes of the program. Bytes are those of the tensors that an operator reads and
writes, each element once; what a kernel keeps for itself, and what caches save or cost, is not in them.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator, Mapping

import sympy
import torch
from torch import fx

from ..program import Program, module_path, module_stack
from .aliasing import strides, writes_in_place
from .kinds import kind_of_leaf, kind_of_operator
from .leaves import leaf_macs
from .macs import FUSED_ATTENTION, REGIONS, attention_map_shape, macs_of
from .parts import Parts
from .sizes import expression, operator_name, product, shape
from .walk import Step, Value, walk

#: What may be in a storage: a trained tensor, any other tensor of the model, an input, or a result on the way.
ROLES = ("parameter", "buffer", "input", "activation")


@dataclasses.dataclass(frozen=True)
class Access:
    """A tensor that an operator reads or writes: its storage (the same number for all views of it), what is in it (see
    `ROLES`), and how many bytes of it are touched."""

    storage: int
    role: str
    bytes: sympy.Expr


@dataclasses.dataclass(frozen=True)
class Operation:
    """One executed operator.

    Attributes:
        name: the node's name in its graph.
        op: the operator, ``"aten.linear"``; empty for a call of a module.
        kind: the kind of its work, one of `kinds.KINDS`. A ``"view"`` touches no data; a ``"call"`` is the call of an
            outlined layer, whose operators come before it.
        module: the path of the innermost module call that it came from; empty for the outermost module.
        layer: the path of the layer that it is in; empty outside of all layers.
        part: the part of the model that it belongs to, one of `parts.PARTS`.
        macs: multiply-accumulates that are executed.
        elements: elements of elementwise work: of the result; of the operand, where a reduction reads more; of the map
            inside a fused attention.
        reads: the tensors that it reads.
        writes: the tensors that it writes; of storages of their own, except where it works in place.
        dtype: of its first result.
        shapes: the shapes of its tensor operands, parameters included, and last of its first result.
        step: the step of the walk that it is.
    """

    name: str
    op: str
    kind: str
    module: str
    layer: str
    part: str
    macs: sympy.Expr
    elements: sympy.Expr
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    dtype: torch.dtype
    shapes: tuple[tuple[sympy.Expr, ...], ...]
    step: Step = dataclasses.field(repr=False, compare=False)

    @property
    def view(self) -> bool:
        """Whether it only makes a view, and touches no data."""
        return self.kind in ("view", "call")

    @property
    def bytes_read(self) -> sympy.Expr:
        """The bytes that it reads."""
        return sympy.Add(*(access.bytes for access in self.reads))

    @property
    def bytes_written(self) -> sympy.Expr:
        """The bytes that it writes."""
        return sympy.Add(*(access.bytes for access in self.writes))

    @property
    def bytes(self) -> sympy.Expr:
        """The bytes that it moves."""
        return self.bytes_read + self.bytes_written

    def replaced(self, symbols: Mapping[sympy.Symbol, sympy.Expr]) -> Operation:
        """The same operation with other symbols."""

        def accesses(old: tuple[Access, ...]) -> tuple[Access, ...]:
            return tuple(dataclasses.replace(access, bytes=access.bytes.xreplace(symbols)) for access in old)

        return dataclasses.replace(
            self,
            macs=self.macs.xreplace(symbols),
            elements=self.elements.xreplace(symbols),
            reads=accesses(self.reads),
            writes=accesses(self.writes),
            shapes=tuple(tuple(size.xreplace(symbols) for size in sizes) for sizes in self.shapes),
        )


def operations(program: Program, parts: Parts | None = None) -> list[Operation]:
    """The operators that a program executes, in order, those of outlined layers once per call.

    Arguments:
        program: any program, before or after a rewrite.
        parts: the parts of the program that it was captured as, for `Operation.layer` and `Operation.part`.

    Raises:
        UnsupportedError: for an operator or a module whose work is not known.

    >>> from fxreuse.frontend.load import load_program
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU())
    >>> for operation in operations(load_program(model, torch.ones(3, 8))):
    ...     print(operation.op, operation.module, operation.kind, [access.role for access in operation.reads])
    aten.linear 0 linear ['input', 'parameter', 'parameter']
    aten.relu 1 elementwise ['activation']
    """
    return operations_of(walk(program.module), parts)


def operations_of(steps: Iterable[Step], parts: Parts | None = None) -> list[Operation]:
    """As `operations`, of the steps of a program."""
    return list(_Reader(parts or Parts()).read(steps))


class _Reader:
    """Makes operations of steps; keeps what is in each storage."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._roles: dict[int, str] = {}
        self._last: dict[str, str] = {}

    def read(self, steps: Iterable[Step]) -> Iterator[Operation]:
        for step in steps:
            for storage, held in step.tensors.items():
                role = "parameter" if isinstance(held, torch.nn.Parameter) else "buffer"
                self._roles.setdefault(storage, role)
            value = step.values[step.node]
            if step.node.op == "placeholder" and isinstance(value, Value):
                self._roles.setdefault(value.storage, "input")
            if _executes(step.node):
                yield self._operation(step)

    def _operation(self, step: Step) -> Operation:
        node, leaf = step.node, step.leaf
        op, macs = leaf_macs(leaf, node) if leaf is not None else (operator_name(node), macs_of(node))
        reads, writes = self._reads(step), self._writes(step)
        kind = self._kind(step, op, macs, reads, writes)
        if kind in ("view", "call"):
            reads, writes = tuple(dataclasses.replace(access, bytes=sympy.Integer(0)) for access in reads), ()
        module, layer = module_path(node) or step.path, self._layer(step)
        part = self._last[layer] = self._parts.of_operator(module, layer, kind, self._last.get(layer))
        return Operation(
            name=node.name,
            op=op,
            kind=kind,
            module=module,
            layer=layer,
            part=part,
            macs=macs,
            elements=_elements(node, kind),
            reads=reads,
            writes=writes,
            dtype=_tensors(node)[0].dtype,
            shapes=_shapes(step),
            step=step,
        )

    def _kind(
        self, step: Step, op: str, macs: sympy.Expr, reads: tuple[Access, ...], writes: tuple[Access, ...]
    ) -> str:
        if step.leaf is not None:
            return kind_of_leaf(step.leaf) if writes else "view"
        if step.node.op == "call_module" or op in REGIONS:
            return "call"
        if not writes:
            return "view"
        return kind_of_operator(op, macs != 0, any(access.role == "parameter" for access in reads))

    def _reads(self, step: Step) -> tuple[Access, ...]:
        """One access per tensor; of the table that a gather reads, as much as it gives."""
        node = step.node
        gathers = isinstance(step.leaf, torch.nn.Embedding) or _is_gather(node)
        found: dict[tuple[int, sympy.Expr], Access] = {}
        for place, operand in enumerate(node.all_input_nodes):
            table = gathers and step.leaf is None and place == 0
            for value, tensor, steps in _values(step, operand):
                touched = product(shape(node)) if table else _touched(tensor, steps)
                found[value.storage, touched] = self._access(value.storage, touched * tensor.element_size())
        for storage, held in step.tensors.items():
            touched = product(shape(node)) if gathers else sympy.Integer(held.numel())
            found[storage, touched] = self._access(storage, touched * held.element_size())
        return tuple(found.values())

    def _writes(self, step: Step) -> tuple[Access, ...]:
        """The results that are no views of an operand, unless they are written in place."""
        node, value = step.node, step.values[step.node]
        if not isinstance(value, Value):
            return ()
        tensors = _tensors(node)
        places = (
            [value.storage]
            if isinstance(node.meta["val"], torch.Tensor)
            else [value.storage + 1 + place for place in range(len(tensors))]
        )
        read = {inner.storage for operand in node.all_input_nodes for inner, _, _ in _values(step, operand)}
        if value.storage in read and not writes_in_place(node):
            return ()
        return tuple(
            self._access(place, _touched(tensor) * tensor.element_size())
            for place, tensor in zip(places, tensors, strict=True)
        )

    def _access(self, storage: int, touched: sympy.Expr) -> Access:
        return Access(storage, self._roles.setdefault(storage, "activation"), touched)

    def _layer(self, step: Step) -> str:
        """The innermost layer that a node is in."""
        calls = [call.removesuffix("@0") for call in (*_prefixes(step.path), *module_stack(step.node))]
        return next((call for call in reversed(calls) if call in self._parts.layers), "")


def _executes(node: fx.Node) -> bool:
    """Whether a node runs something that gives a tensor."""
    if node.op not in ("call_function", "call_module") or node.target is operator.getitem:
        return False
    return bool(_tensors(node))


def _is_gather(node: fx.Node) -> bool:
    return kind_of_operator(operator_name(node), contracts=False, weighs=False) == "gather"


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    """The tensors that a node gives."""
    value = node.meta.get("val")
    parts = value if isinstance(value, (tuple, list)) else [value]
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _values(step: Step, node: fx.Node) -> Iterator[tuple[Value, torch.Tensor, tuple[sympy.Expr, ...]]]:
    """The tensors of a node's value: each with its identity and its strides."""
    value = step.values[node]
    if isinstance(value, Value):
        for tensor in _tensors(node):
            yield value, tensor, strides(node) if isinstance(node.meta["val"], torch.Tensor) else _strides(tensor)
    elif isinstance(value, (tuple, list)):
        for part, tensor in zip(value, node.meta["val"], strict=True):
            if isinstance(part, Value) and isinstance(tensor, torch.Tensor):
                yield part, tensor, _strides(tensor)


def _strides(tensor: torch.Tensor) -> tuple[sympy.Expr, ...]:
    return tuple(expression(step) for step in tensor.stride())


def _touched(tensor: torch.Tensor, steps: tuple[sympy.Expr, ...] | None = None) -> sympy.Expr:
    """The number of elements of a tensor; what is broadcast without a copy counts once."""
    sizes = [expression(size) for size in tensor.shape]
    if steps is None:
        return product(sizes)
    return product(size for size, step in zip(sizes, steps, strict=True) if step != 0)


def _elements(node: fx.Node, kind: str) -> sympy.Expr:
    """The elements of a node's elementwise work."""
    if kind in ("view", "call", "linear", "product", "convolution"):
        return sympy.Integer(0)
    if kind == "attention" and operator_name(node) in FUSED_ATTENTION:
        return product(attention_map_shape(node))
    result = product(shape(node))
    if kind != "reduction":
        return result
    sizes = [product(map(expression, tensor.shape)) for operand in node.all_input_nodes for tensor in _tensors(operand)]
    return sizes[0] if sizes else result


def _shapes(step: Step) -> tuple[tuple[sympy.Expr, ...], ...]:
    """The shapes of the tensors that a node reads, and of its first result."""
    node = step.node
    read = [tensor for operand in node.all_input_nodes for tensor in _tensors(operand)]
    return tuple(tuple(map(expression, tensor.shape)) for tensor in (*read, *step.tensors.values(), _tensors(node)[0]))


def _prefixes(path: str) -> Iterator[str]:
    """The paths around a path and itself, outermost first.

    >>> list(_prefixes("encoder.layer.0"))
    ['encoder', 'encoder.layer', 'encoder.layer.0']
    """
    parts = path.split(".") if path else []
    return (".".join(parts[: count + 1]) for count in range(len(parts)))
