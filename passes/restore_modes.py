"""Put back what depends on train and eval mode: dropout, normalisation, stochastic depth, attention's dropout."""

from __future__ import annotations

import copy

import torch
from torch import fx

from fxreuse.frontend.mode_modules import MARKER
from fxreuse.modules import DropoutProbability
from fxreuse.nodes import call, inserting_before, is_call, replace
from fxreuse.program import Program, module_path
from fxreuse.tree import free_path, own_copy, place

from .steps import Pass

_DROPOUT = (torch.ops.aten.dropout.default, torch.ops.aten.dropout_.default)
_FUSED = torch.ops.aten.scaled_dot_product_attention.default
_SOFTMAX = (torch.ops.aten.softmax.int, torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default)


@Pass
def restore_modules(program: Program) -> None:
    """Markers become calls of the modules that they stand for. Exact tier.

    Sound because capture let the marker stand in for that very call. The module is a copy that shares parameters and
    buffers with the original, so that the two can be in different modes.
    """
    for node in list(program.graph.nodes):
        if not is_call(node, MARKER):
            continue
        value, path = node.args
        place(program.module, path, own_copy(program.mode_modules[path]))
        with program.graph.inserting_before(node):
            made = program.graph.call_module(path, (value,))
        made.meta = copy.copy(node.meta)
        replace(node, made)


@Pass
def restore_functional_dropout(program: Program) -> None:
    """``dropout(x, p, False)`` becomes a Dropout module. Exact tier: in eval mode both are the identity.

    The probability is the one that was seen in training mode, where the model was run in it; a dropout that is never
    applied goes, and one that is applied in eval mode stays as it is.
    """
    orders: dict[str, int] = {}
    for node in list(program.graph.nodes):
        if not is_call(node, *_DROPOUT):
            continue
        owner = module_path(node)
        order = orders.setdefault(owner, 0)
        orders[owner] += 1
        value, probability, active = node.args
        if active:
            continue
        probability = program.functional_dropout.get((owner, order), probability)
        if probability == 0.0:
            replace(node, value)
            continue
        path = free_path(program.module, owner, "dropout")
        place(program.module, path, torch.nn.Dropout(probability).eval())
        with inserting_before(node) as insert:
            made = insert(path, value)
        replace(node, made)


@Pass
def restore_attention_dropout(program: Program) -> None:
    """Attention's own dropout, which eval mode erased, is put back with the recorded probability. Exact tier.

    A fused operator gets its ``dropout_p`` from a module that gives the probability in training mode and 0 in eval
    mode; a softmax inside ``multi_head_attention_forward`` gets a Dropout module between it and its readers.
    """
    orders: dict[str, int] = {}
    for node in list(program.graph.nodes):
        if not is_call(node, _FUSED, *_SOFTMAX):
            continue
        path = module_path(node)
        order = orders.get(path, 0)
        orders[path] = order + 1
        probability = program.attention_dropout.get((path, order), 0.0)
        if probability == 0.0:
            continue
        if node.target is _FUSED:
            _fused_dropout(program, node, path, probability)
        else:
            _softmax_dropout(program, node, path, probability)


def _fused_dropout(program: Program, node: fx.Node, path: str, probability: float) -> None:
    place_at = free_path(program.module, path, "dropout_p")
    place(program.module, place_at, DropoutProbability(probability).eval())
    with inserting_before(node) as insert:
        value = insert(place_at)
    if len(node.args) > 4:
        node.update_arg(4, value)
    else:
        node.update_kwarg("dropout_p", value)


def _softmax_dropout(program: Program, node: fx.Node, path: str, probability: float) -> None:
    place_at = free_path(program.module, path, "dropout")
    place(program.module, place_at, torch.nn.Dropout(probability).eval())
    with program.graph.inserting_after(node):
        made = call(program.graph, place_at, (node,), {}, like=node)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
