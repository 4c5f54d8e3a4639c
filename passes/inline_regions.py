"""Inline the sub-graphs that export makes of ``torch.no_grad`` and ``torch.autocast`` regions."""

from __future__ import annotations

import torch
from torch import fx

from fxreuse.nodes import inserting_before, is_call
from fxreuse.program import Program, get_attribute, module_path
from fxreuse.record import Note

from .steps import Pass

_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_MATMUL = {torch.ops.aten.matmul.default, torch.ops.aten.bmm.default}
_CAST_BY_AUTOCAST = _MATMUL | {
    torch.ops.aten.linear.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.scaled_dot_product_attention.default,
}


@Pass
def inline_regions(program: Program) -> None:
    """Inline every grad and autocast region. Exact tier.

    Sound because the nodes are the region's own, in its order. What a no-grad region returns is detached, so that no
    gradient flows where none did. What the original runs outside autocast stays outside of its effect: autocast only
    touches products, and the one product that such regions have in practice, the outer product of positions and
    frequencies of a rotary embedding, is a multiplication, which autocast leaves alone; the two are equal to the bit
    because the contracted size is 1. Any other product is named in a note.
    """
    changed = True
    notes: list[Note] = []
    while changed:
        changed = False
        for node in list(program.graph.nodes):
            if is_call(node, _GRAD):
                enabled, region, *inputs = node.args
                _inline(program, node, region, inputs, detach=not enabled)
                changed = True
            elif is_call(node, _AUTOCAST):
                _, _, enabled, _, region, *inputs = node.args
                if enabled:
                    text = "runs inside an autocast region of its own in the original, but not here"
                    notes.append(Note("capture", module_path(node) or program.name, text, "run all of it in autocast"))
                else:
                    notes += _keep_outside_autocast(program, region)
                _inline(program, node, region, inputs, detach=False)
                changed = True
    program.module.delete_all_unused_submodules()
    program.notes = (*program.notes, *notes)


def _inline(program: Program, node: fx.Node, region: fx.Node, inputs: list[fx.Node], detach: bool) -> None:
    """Put the nodes of a region's graph in the place of the call."""
    module = get_attribute(program.module, str(region.target))
    values = dict(zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with program.graph.inserting_before(node):
        for inner in module.graph.nodes:
            if inner.op in ("placeholder", "output"):
                continue
            if inner.op == "get_attr" and not isinstance(get_attribute(module, inner.target), fx.GraphModule):
                raise AssertionError(f"a region reads {inner.target} that was not passed to it")
            copied = program.graph.node_copy(inner, lambda old: values[old])
            if inner.op == "get_attr":
                copied.target = f"{region.target}.{inner.target}"
            values[inner] = copied
    (returned,) = module.graph.output_node().args
    results = [values[item] if isinstance(item, fx.Node) else item for item in returned]
    for user in list(node.users):
        result = results[int(user.args[1])]  # type: ignore[arg-type]
        if detach and isinstance(result, fx.Node) and _may_have_gradient(result.meta["val"]):
            with inserting_before(user) as insert:
                result = insert(torch.ops.aten.detach.default, result)
        user.replace_all_uses_with(result)
        program.graph.erase_node(user)
    program.graph.erase_node(node)
    if not region.users:
        program.graph.erase_node(region)


def _may_have_gradient(value: object) -> bool:
    """Whether a value is one that gradients flow through: a floating tensor, not a size nor indices."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _keep_outside_autocast(program: Program, region: fx.Node) -> list[Note]:
    notes = []
    graph = get_attribute(program.module, str(region.target)).graph
    for node in list(graph.nodes):
        if not is_call(node, *_CAST_BY_AUTOCAST):
            continue
        if node.target in _MATMUL and node.args[0].meta["val"].shape[-1] == 1:
            node.target = torch.ops.aten.mul.Tensor
        else:
            notes.append(
                Note(
                    "capture",
                    node.name,
                    "runs outside autocast in the original, but inside it here",
                    "run without autocast",
                )
            )
    return notes
