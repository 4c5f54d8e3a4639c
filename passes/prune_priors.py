"""Pruning by priors: what is cut is left out, the priors become 1 and are gone (FiAK, last steps of Algorithms 1–3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fxreuse.nodes import remove_dead
from fxreuse.priors.pruning import SitePruning
from fxreuse.priors.selection import Kept
from fxreuse.program import Program, get_attribute
from fxreuse.tree import drop, free_path, reads

from .insert_priors import SitePrior, logarithm_of
from .new_tensors import free_sizes, put_tensor, read_tensor
from .prune_site import SitePruner
from .pruning_record import scores_like


def prune_priors(
    program: Program, priors: Sequence[SitePrior], kept: Sequence[Kept], lowering: str = "auto"
) -> tuple[Program, list[SitePruning]]:
    """Leave out what is not kept, and take the priors out. Architecture tier.

    Keys are gathered before they are projected; scores are hidden by a boolean mask or, in blocks, skipped. Sound
    because a softmax gives a hidden score no weight, so that it may as well not be there, and because the priors that
    are left are 1, whose logarithm adds nothing. Every lowering gives the same value as the mask does.

    Arguments:
        program: a program with priors, before or after reuse; it is not changed.
        priors: its priors.
        kept: what is left of each site.
        lowering: ``"mask"``, ``"flex"``, ``"gather"``, or ``"auto"`` for what costs least.

    Returns:
        A program without these priors, and what was done.

    Raises:
        UnsupportedError: the lowering skips blocks, and the site is not one that this can be done for.
    """
    program = program.copy()
    before = reads(program).keys()
    with free_sizes():
        done = [SitePruner(program, prior, one).prune(lowering) for prior, one in zip(priors, kept, strict=True)]
    remove_dead(program.graph)
    drop(program, {*before, *(path for site in done for path in site.buffers)} - reads(program).keys())
    program.module.recompile()
    program.check()
    return program, [site.record for site in done]


def hide_scores(program: Program, priors: Sequence[SitePrior], kept: Sequence[Kept]) -> tuple[Program, list[SitePrior]]:
    """Give what is not kept no weight, and keep the priors, to be trained on. Architecture tier.

    Returns:
        A program, and the priors with the paths of the buffers that say what is kept.
    """
    program = program.copy()
    hidden = []
    for prior, one in zip(priors, kept, strict=True):
        node = logarithm_of(program, prior)
        path = prior.kept or free_path(program.module, prior.parameter.rpartition(".")[0], "kept")
        device = get_attribute(program.module, prior.parameter).device
        put_tensor(program, path, scores_like(one.scores, node).to(device))
        node.args = (node.args[0], read_tensor(program, path, node), *node.args[2:])
        hidden.append(dataclasses.replace(prior, kept=path))
    remove_dead(program.graph)
    program.module.recompile()
    program.check()
    return program, hidden
