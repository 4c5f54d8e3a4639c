"""`fxreuse.prune`: a model with trained priors becomes one without what they cut; at once, or step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .emission.emit import emit
from .emission.rewritten import Rewritten
from .errors import FxReuseError
from .frontend.inputs import check_model
from .frontend.target import replace_submodule
from .passes.fold_modules import fold_modules
from .passes.insert_priors import SitePrior
from .passes.prune_priors import hide_scores, prune_priors
from .plans.plan_fiak import check_fiak_lowering, check_fractions, check_mixture
from .priors.blueprint import Blueprint
from .priors.pruning import SitePruning
from .priors.selection import Kept, select
from .program import Program, get_attribute
from .record import Record


def prune(
    model: torch.nn.Module,
    scores: float | None = None,
    keys: float | None = None,
    *,
    final: bool = True,
    lowering: str | None = None,
) -> torch.nn.Module:
    """Prune a model by its priors: Algorithms 1 to 3 of FiAK.

    In each layer the scores and keys whose priors are smallest are cut, the priors that are left become 1 and are gone.
    Keys are cut before they are projected. What is left is to be fine-tuned.

    Arguments:
        model: what `apply` made under a ``fiak`` plan, after training; in any state that a module may be in. It is not
            changed, and shares its parameters with the result. A host of one (``target=``) is changed in place.
        scores: the fraction of the scores to cut, those of cut keys among them. Where neither is given, scores and keys
            are those of the plan.
        keys: the fraction of the keys to cut.
        final: whether this is the last step. Otherwise what is cut gets no weight and no gradient, and the other priors
            stay, to be trained on and pruned further; see `prune_schedule`. What an earlier step cut stays cut, unless
            its query has no other key left, or a block that is left has it.
        lowering: how cut scores are left out, in place of what the plan says: ``"auto"``, ``"mask"``, ``"flex"`` or
            ``"gather"``.

    Returns:
        The pruned model. `describe` says what was cut and how much of it is really skipped.

    Raises:
        FxReuseError: the model has no priors.
        PlanError: a fraction that cannot be, or that leaves a query without a key.
        UnsupportedError: a lowering that an attention cannot have.

    >>> import torch, fxreuse
    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    >>> weighed = fxreuse.apply(model, "fiak", torch.randn(2, 10, 16))  # train this
    >>> pruned = fxreuse.prune(weighed, scores=0.7, keys=0.2)
    >>> [(site.keys_kept, site.scores_kept) for site in fxreuse.describe(pruned).pruned]
    [(8, 60), (8, 60)]
    """
    check_model(model, "prune")
    found = _weighed(model)
    pruned = _prune(found, found.blueprint, scores, keys, final, lowering)
    if found is model:
        return pruned
    path = next(path for path, module in model.named_modules() if module is found)
    return replace_submodule(model, path, pruned)


@dataclasses.dataclass(frozen=True)
class PruneStep:
    """One step of a schedule: call it on a model to prune it that far."""

    scores: float
    keys: float
    final: bool

    def __call__(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model, pruned."""
        return prune(model, self.scores, self.keys, final=self.final)


def prune_schedule(scores: float = 0.0, keys: float = 0.0, steps: int = 4) -> list[PruneStep]:
    """Prune in steps, to be fine-tuned after each: many at first, few at last, as 1 − (1 − t)³ of the way.

    Before the last step the priors stay and are trained on. Every step returns a model that shares its parameters with
    the one before, so that an optimizer goes on with what it has.

    Raises:
        PlanError: fractions that cannot be.

    >>> [(round(step.scores, 3), step.final) for step in prune_schedule(scores=0.7, steps=3)]
    [(0.493, False), (0.674, False), (0.7, True)]
    """
    check_fractions(scores, keys)
    if steps < 1:
        raise FxReuseError(f"prune_schedule: steps= is at least 1, found {steps}")
    parts = [1 - (1 - step / steps) ** 3 for step in range(1, steps + 1)]
    return [PruneStep(part * scores, part * keys, part == 1) for part in parts]


def _weighed(model: torch.nn.Module) -> Rewritten:
    """The part of a model that has priors."""
    found = [module for module in model.modules() if isinstance(module, Rewritten)]
    with_priors = [module for module in found if module.blueprint is not None]
    if with_priors:
        return with_priors[0]
    if any(module.record.pruned for module in found):
        raise FxReuseError(
            f"{type(model).__name__} was pruned already, and its priors are gone. Prune what apply returned, or prune "
            "in steps with prune_schedule."
        )
    what = "has no priors" if found else "was not made by fxreuse.apply, and has no priors"
    raise FxReuseError(
        f"{type(model).__name__} {what} to prune by. Apply a plan with a fiak pass, such as 'fiak', train what comes "
        "out, and prune it."
    )


def _prune(
    model: Rewritten,
    blueprint: Blueprint,
    scores: float | None,
    keys: float | None,
    final: bool,
    lowering: str | None,
) -> Rewritten:
    program = blueprint.program(model)
    kept = [_select(program, prior, scores, keys) for prior in blueprint.priors]
    modes = {path: module.training for path, module in model.named_modules()}
    if not final:
        program, priors = hide_scores(program, blueprint.priors, kept)
        remains = Blueprint.of(program, blueprint.layer_paths, tuple(priors))
        pruned = emit(fold_modules(program), _plain(model.record), blueprint.layer_paths, modes)
        pruned.blueprint = remains
        return pruned
    done: list[SitePruning] = []
    for prior, one in zip(blueprint.priors, kept, strict=True):
        wanted = prior.plan.lowering if lowering is None else lowering
        check_fiak_lowering(wanted, prior.plan.block)
        program, made = prune_priors(program, [prior], [one], wanted)
        done += made
    return emit(fold_modules(program), _pruned(model.record, done, blueprint.priors), blueprint.layer_paths, modes)


def _select(program: Program, prior: SitePrior, scores: float | None, keys: float | None) -> Kept:
    """What is left of a site."""
    plan = prior.plan
    given = scores is not None or keys is not None
    scores, keys = (scores or 0.0, keys or 0.0) if given else (plan.scores, plan.keys)
    check_fractions(scores, keys)
    if plan.prior == "mixture":
        check_mixture(scores)
    parameter = get_attribute(program.module, prior.parameter).detach()
    # a model without weights is pruned as an untrained one: counts depend on sizes alone
    magnitude = torch.ones(parameter.shape) if parameter.is_meta else parameter.abs().cpu()
    if not plan.per_head:
        magnitude = magnitude.unsqueeze(0)
    before = None
    if prior.kept is not None:
        kept = get_attribute(program.module, prior.kept)
        before = None if kept.is_meta else kept.cpu().reshape(-1, *kept.shape[-2:])
    return select(
        magnitude,
        prior.admissible,
        scores=scores,
        keys=keys,
        block=plan.block,
        causal=prior.causal,
        before=before,
        where=prior.site,
    )


def _plain(record: Record) -> Record:
    """A record without the notes that emission makes anew."""
    return dataclasses.replace(record, notes=tuple(note for note in record.notes if note.kind != "outline"))


def _pruned(record: Record, done: Sequence[SitePruning], priors: Sequence[SitePrior]) -> Record:
    """The record after pruning: the priors are gone, and what was cut is there."""
    gone = {prior.parameter for prior in priors}
    sites = {site.site: site for site in done}
    decisions = tuple(
        dataclasses.replace(
            one, action="prune", lowering=sites[one.site].lowering, reason=sites[one.site].reason, added=()
        )
        if one.action == "weigh"
        else one
        for one in record.decisions
    )
    added = {path: count for path, count in record.added.items() if path not in gone}
    return dataclasses.replace(_plain(record), decisions=decisions, added=added, pruned=tuple(done))
