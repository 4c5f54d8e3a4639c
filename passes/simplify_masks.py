"""Drop the masks that do nothing, and let kernels know of the plain causal ones. Exact tier.

A T×T mask costs memory and keeps fused attention off its fastest kernels, whatever it holds. Four rewrites, each on a
proof (`fxreuse.masks.mask_proof`) that is valid for every size the program accepts:

* fused attention whose mask is all true, or adds nothing but 0: the mask is left out;
* fused attention whose mask is ``key <= query``: ``is_causal``, which is aligned at the top left as the formula is;
* ``where`` and ``masked_fill`` whose condition is constant, and the addition of a mask of zeros: the operand itself;
* fused attention whose bias went through such a ``where`` only to be broadcast over the batch: the bias as it was.

Why this is sound. *Values*: a condition that is the same everywhere selects the same operand everywhere, and adding 0
changes nothing (but the sign of a zero). Under ``is_causal`` a hidden score is minus infinity; under a mask to add it
was lower by the whole range of its type: its weight is 0 either way, because every query sees at least key 0. *Shape
and type*: ``where`` promotes types and broadcasts shapes, so an operand takes the place of the result only if both are
equal, for all sizes; a mask is left out of a fused attention only if it was no larger than queries and keys.
*Memory*: an operand is not handed out in place of a fresh tensor if either of them is written to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import sympy
import torch
from torch import fx

from fxreuse.masks.index_call import same_size, sizes_of
from fxreuse.masks.mask_proof import MaskProver
from fxreuse.nodes import argument, inserting_before, is_call, remove_dead
from fxreuse.program import Program, module_path
from fxreuse.record import Note

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_WHERE = (torch.ops.aten.where.self, torch.ops.aten.where.ScalarOther, torch.ops.aten.where.ScalarSelf)
_MASKED_FILL = (torch.ops.aten.masked_fill.Scalar, torch.ops.aten.masked_fill.Tensor)
_COPIES = (torch.ops.aten.contiguous.default, torch.ops.aten.clone.default, torch.ops.aten.expand.default)

_TEXTS = {
    "all": "attention mask proved all true and dropped",
    "causal": "attention mask proved causal and replaced by is_causal",
    "selection": "selection by a mask that is the same everywhere removed",
    "zero": "addition of a mask proved zero removed",
    "bias": "attention bias no longer broadcast over the batch by a mask proved all true",
}


def simplify_masks(program: Program) -> Program:
    """The program without the masks that do nothing, and with ``is_causal`` for the causal ones. Exact tier.

    Args:
        program: a normalised program: in particular its views are reshapes, so that an operand may have another memory
            layout than the result that it stands in for.

    Returns:
        A new program. For every kind of simplification it has a note of kind ``"mask"``, with how often it was done
        and the place of the first.
    """
    program = program.copy()
    simplifier = _Simplifier(MaskProver(program.graph))
    for node in list(program.graph.nodes):
        kind = simplifier.simplify(node)
        if kind is not None:
            simplifier.places.setdefault(kind, []).append(module_path(node) or "(root)")
    if not simplifier.places:
        return program
    remove_dead(program.graph)
    program.module.recompile()
    notes = tuple(_note(kind, places) for kind, places in simplifier.places.items())
    return dataclasses.replace(program, notes=program.notes + notes)


def _note(kind: str, places: Sequence[str]) -> Note:
    times = "once" if len(places) == 1 else f"{len(places)} times, here first"
    return Note(kind="mask", where=places[0], text=f"{_TEXTS[kind]} ({times})")


class _Simplifier:
    """The rewrites over one graph. What was proved of a node stays true, as every rewrite keeps all values."""

    def __init__(self, prover: MaskProver) -> None:
        self.places: dict[str, list[str]] = {}
        self._prover = prover
        self._compact: dict[fx.Node, fx.Node] = {}

    def simplify(self, node: fx.Node) -> str | None:
        """Simplify one node if that is possible; the kind of what was done."""
        if is_call(node, _ATTENTION):
            return self._attention(node)
        if is_call(node, *_WHERE, *_MASKED_FILL):
            return self._replace(node, self._selected(node), "selection")
        if is_call(node, torch.ops.aten.add.Tensor):
            return self._replace(node, self._augend(node), "zero")
        return None

    def _attention(self, node: fx.Node) -> str | None:
        mask = argument(node, 3, "attn_mask")
        if mask is None or argument(node, 5, "is_causal", False) is not False or not _fits(node, mask):
            return None
        kind = self._prover.prove(mask).kind
        if kind == "all":
            _set_mask(node, None, is_causal=False)
            return kind
        if kind == "causal" and _is_whole(node, mask):
            _set_mask(node, None, is_causal=True)
            return kind
        bias = self._bias(mask)
        if bias is None:
            return None
        if bias not in self._compact:
            with inserting_before(node) as insert:
                self._compact[bias] = insert(torch.ops.aten.contiguous.default, bias)
        _set_mask(node, self._compact[bias], is_causal=False)
        return "bias"

    def _selected(self, node: fx.Node) -> fx.Node | None:
        """The operand that a ``where`` or ``masked_fill`` returns everywhere, if there is one, and it is a tensor."""
        names = ("self", "mask", "value") if is_call(node, *_MASKED_FILL) else ("other", "condition", "self")
        places = range(3) if is_call(node, *_MASKED_FILL) else (2, 0, 1)
        otherwise, condition, then = (argument(node, k, name) for k, name in zip(places, names, strict=True))
        constant = self._prover.constant(condition) if isinstance(condition, fx.Node) else None
        chosen = None if constant is None else then if constant else otherwise
        return chosen if isinstance(chosen, fx.Node) else None

    def _augend(self, node: fx.Node) -> fx.Node | None:
        """The other operand of an addition of floating-point zeros."""
        one, other = argument(node, 0, "self"), argument(node, 1, "other")
        if argument(node, 2, "alpha", 1) != 1:
            return None
        for operand, mask in ((one, other), (other, one)):
            if isinstance(operand, fx.Node) and isinstance(mask, fx.Node) and self._is_zero(mask):
                return operand
        return None

    def _is_zero(self, mask: fx.Node) -> bool:
        value = mask.meta.get("val")
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return floating and self._prover.prove(mask).kind == "all"

    def _replace(self, node: fx.Node, operand: fx.Node | None, kind: str) -> str | None:
        if operand is None or not _same_type(node, operand) or self._is_written(node) or self._is_written(operand):
            return None
        node.replace_all_uses_with(operand)
        return kind

    def _is_written(self, node: fx.Node) -> bool:
        return self._prover.forms.written(node)

    def _bias(self, mask: fx.Node) -> fx.Node | None:
        """What a bias was before a constant selection broadcast it; None if it went through none."""
        source, selections = mask, 0
        while True:
            selected = self._selected(source) if is_call(source, *_WHERE) else None
            step = argument(source, 0, "self") if is_call(source, *_COPIES) else selected
            if step is None or self._is_written(step) or not _broadcasts(step, mask):
                return source if selections else None
            source, selections = step, selections + (selected is not None)


def _set_mask(node: fx.Node, mask: fx.Node | None, is_causal: bool) -> None:
    """Give a fused attention another mask; what is left at its default is left out."""
    options = {
        "attn_mask": mask,
        "dropout_p": argument(node, 4, "dropout_p", 0.0),
        "is_causal": is_causal,
        "scale": argument(node, 6, "scale"),
        "enable_gqa": argument(node, 7, "enable_gqa", False),
    }
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    operands = tuple(argument(node, k, name) for k, name in enumerate(("query", "key", "value")))
    node.args = operands
    node.kwargs = {name: value for name, value in options.items() if value != defaults[name]}


def _map_sizes(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """The sizes of a fused attention's map: those of the queries, with the keys in place of the last."""
    query, key = argument(node, 0, "query"), argument(node, 1, "key")
    return (*sizes_of(query)[:-1], sizes_of(key)[-2])


def _fits(node: fx.Node, mask: fx.Node) -> bool:
    """Whether the map has its sizes without the mask too."""
    return _within(sizes_of(mask), _map_sizes(node))


def _is_whole(node: fx.Node, mask: fx.Node) -> bool:
    """Whether the mask has a row for every query and a column for every key."""
    return all(map(same_size, sizes_of(mask)[-2:], _map_sizes(node)[-2:]))


def _broadcasts(source: fx.Node, mask: fx.Node) -> bool:
    """Whether ``source`` may stand in for ``mask`` where it is broadcast anyway: same type, sizes equal or 1."""
    return source.meta["val"].dtype == mask.meta["val"].dtype and _within(sizes_of(source), sizes_of(mask))


def _within(sizes: Sequence[sympy.Expr], limits: Sequence[sympy.Expr]) -> bool:
    """Whether sizes, matched from the right, are each 1 or the size that they are broadcast to."""
    pairs = zip(reversed(sizes), reversed(limits), strict=False)
    return len(sizes) <= len(limits) and all(size == 1 or same_size(size, limit) for size, limit in pairs)


def _same_type(node: fx.Node, operand: fx.Node) -> bool:
    """Whether two tensors have the same element type and, for all sizes, the same shape."""
    ours, theirs = sizes_of(node), sizes_of(operand)
    same = len(ours) == len(theirs) and all(map(same_size, ours, theirs))
    return same and node.meta["val"].dtype == operand.meta["val"].dtype
