"""A whole plan, laid over a program: its passes in the order in which they are written, and the record of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import sympy

from .attention import AttentionSites
from .cost_model.count import count
from .errors import PlanError
from .passes.lay_reuse import lay_reuse
from .passes.lay_weights import Leaves, Weights, add_to_shared, lay_residual, lay_share
from .passes.weight_groups import groups_at, groups_that_share
from .plans.plan import Plan, Reuse
from .plans.plan_weights import Residual, Share
from .plans.stack_choice import choose_named_stack, choose_stack
from .program import Program
from .record import Decision, FitError, Note, Record, SharedMatrix
from .weights.block import Block, find_block


def lay_plan(
    program: Program, sites: AttentionSites, plan: Plan, leaves: Leaves, captured: Program | None = None
) -> tuple[Program, Record]:
    """Do what a plan says, but for its fiak passes, which come first (`fxreuse.weigh`).

    Arguments:
        program: a normalised program; it is not changed.
        sites: its attentions.
        plan: the plan.
        leaves: gives the example inputs as the program's placeholders take them; it is called where they are needed.
        captured: the program before anything was added to it, in which the layers of a stack are alike.

    Returns:
        The program after all passes, and the record.

    Raises:
        PlanError: where the plan does not fit.
        UnsupportedError: where the rewrite would not be sound.
    """
    laying = _Laying(program, sites, plan, leaves, captured or program)
    for step in plan.passes:
        if isinstance(step, Reuse):
            laying.reuse(step)
        elif isinstance(step, Share):
            laying.share(step)
        elif isinstance(step, Residual):
            laying.residual(step)
    return laying.program, laying.record()


class _Laying:
    """The program as far as it is rewritten, and what was decided on the way.

    Blocks are found in the captured program, where the layers of a stack are alike; names of nodes survive passes.
    """

    def __init__(self, program: Program, sites: AttentionSites, plan: Plan, leaves: Leaves, captured: Program) -> None:
        self.program = program
        self._captured = captured
        self._sites = sites
        self._plan = plan
        self._leaves = leaves
        self._layers = {name: len(members) for name, members in sites.stacks.items()}
        self._blocks: dict[tuple[str, bool], Block] = {}
        self._groups: dict[str, tuple[int, ...]] = {}
        self._with_residuals: set[str] = set()
        self._with_convolutions: set[str] = set()
        self._decisions: tuple[Decision, ...] = ()
        self._removed: dict[str, int] = {}
        self._added: dict[str, int] = {}
        self._buffers: tuple[str, ...] = ()
        self._notes: list[Note] = []
        self._matrices: dict[str, tuple[SharedMatrix, ...]] = {}
        self._fits: tuple[FitError, ...] = ()

    def reuse(self, step: Reuse) -> None:
        """Lay a reuse pass."""
        name, leaders = choose_stack(step, self._layers)
        if any(decision.stack == name for decision in self._decisions):
            raise PlanError(
                f"plan {str(self._plan)!r} names the stack {name} twice; give every stack one part of the plan."
            )
        self._check_before_weights(step, name)
        result = lay_reuse(self.program, self._sites.stacks[name], leaders, step)
        self._notes += result.notes
        self._notes += _note_gain(self.program, result.program, step.values, name)
        self.program = keep_leaders(result.program, result.decisions, self._sites)
        self._decisions += result.decisions
        self._count(result.removed, result.added)
        self._buffers += result.buffers_removed

    def share(self, step: Share) -> None:
        """Lay a share pass."""
        name, leaders = self._grouped(step)
        self._take(lay_share(self.program, self._block(name, step.convolutions), leaders, step))

    def residual(self, step: Residual) -> None:
        """Lay a residual pass."""
        if step.groups is not None:
            name, leaders = self._grouped(step)
            block = self._block(name, step.convolutions)
            self._take(lay_residual(self.program, block, leaders, step, self._leaves))
        else:
            name = self._shared_stack(step)
            if name in self._with_residuals:
                raise PlanError(f"plan {str(self._plan)!r} adds residuals to the stack {name} twice.")
            program = self.program.copy()
            if name in self._groups:
                if step.convolutions and name not in self._with_convolutions:
                    raise PlanError(
                        f"plan {str(self._plan)!r}: the weights of convolutions in stack {name} are not shared, so "
                        "that none can have a residual; write convolutions=yes in the share pass, too."
                    )
                groups = groups_at(program, self._block(name, step.convolutions), self._groups[name])
            else:
                groups = groups_that_share(program, self._sites, name, step.convolutions)
            self._take(add_to_shared(program, groups, name, step))
        self._with_residuals.add(name)

    def record(self) -> Record:
        """The record so far; matrices of projections that a later pass took out are not in it."""
        left = {node.name for node in self.program.graph.nodes}
        matrices = [one for name, found in self._matrices.items() if name in left for one in found]
        return Record(
            str(self._plan),
            self._layers,
            self._decisions,
            self._removed,
            self._added,
            tuple(self._notes),
            buffers_removed=self._buffers,
            matrices=tuple(matrices),
            fits=self._fits,
        )

    def _grouped(self, step: Share | Residual) -> tuple[str, tuple[int, ...]]:
        """The stack that weights are shared in, and the first layer of each layer's group."""
        assert step.groups is not None
        name, leaders = choose_stack(step, self._layers)
        largest = max(leaders.count(leader) for leader in leaders)
        size = getattr(step.groups, "size", largest)
        if size > len(leaders):
            raise PlanError(
                f"plan {str(step)!r}: k={size} is more than the {len(leaders)} layers of stack {name}; "
                f"choose k from 2 to {len(leaders)}."
            )
        if name in self._groups:
            raise PlanError(
                f"plan {str(self._plan)!r} shares the weights of stack {name} twice; "
                + ("leave k= out of the residual pass." if isinstance(step, Residual) else "name it once.")
            )
        self._groups[name] = leaders
        if step.convolutions:
            self._with_convolutions.add(name)
        return name, leaders

    def _shared_stack(self, step: Residual) -> str:
        """The stack that residuals are added to: the only one whose weights the plan shares, if none is named."""
        if step.stack is None and len(self._groups) == 1:
            return next(iter(self._groups))
        return choose_named_stack(step, self._layers)

    def _check_before_weights(self, step: Reuse, name: str) -> None:
        """What makes layers differ in size comes before their weights are shared."""
        if name not in self._groups and name not in self._with_residuals:
            return
        fused = any(
            len(parts) > 1
            for place in self._block(name, name in self._with_convolutions).places
            for parts in place.parts
        )
        if step.values == 1 and step.ffn is None and not fused:
            return
        reason = (
            "queries, keys and values are fused in one weight, of which followers would keep the rows of their values "
            "while other layers read all of it"
            if fused
            else "it changes the sizes of weights"
        )
        others = [other for other in self._plan.passes if other is not step]
        raise PlanError(
            f"plan {str(self._plan)!r}: {str(step)!r} comes after the weights of stack {name} are shared, and "
            f"{reason}; write the reuse pass first: {' | '.join(map(str, [step, *others]))!r}."
        )

    def _block(self, name: str, convolutions: bool = False) -> Block:
        key = name, convolutions
        if key not in self._blocks:
            self._blocks[key] = find_block(self._captured, self._sites, name, convolutions)
        return self._blocks[key]

    def _take(self, done: Weights) -> None:
        self.program = done.program
        self._count(done.removed, done.added)
        self._matrices |= done.matrices
        self._fits += done.fits
        self._notes += done.notes

    def _count(self, removed: Mapping[str, int], added: Mapping[str, int]) -> None:
        """Of one parameter, one pass may remove a part and another one the rest."""
        for total, more in ((self._removed, removed), (self._added, added)):
            for path, size in more.items():
                total[path] = total.get(path, 0) + size


def _note_gain(before: Program, after: Program, values: int, stack: str) -> list[Note]:
    """A note where wider values cost all the work that shared maps save."""
    if values == 1:
        return []
    saved = sympy.expand(count(before).macs - count(after).macs)
    if not saved.is_nonpositive:
        return []
    price = "as much as" if saved == 0 else "more than"
    text = f"values={values} costs {price} reuse saves: no fewer multiply-accumulates than before, at any length"
    return [Note("cost", stack, text, "leave values= out for speed; it is there to keep the number of parameters")]


def keep_leaders(program: Program, decisions: Sequence[Decision], sites: AttentionSites) -> Program:
    """LayerDrop never drops a layer whose map others need."""
    leading = {decision.site for decision in decisions if decision.action == "lead"}
    kept = [site.layer_path for site in sites if str(site) in leading and site.layer_path in program.layerdrop]
    if not kept:
        return program
    layers = "the layer" if len(kept) == 1 else f"the {len(kept)} layers"
    text = f"LayerDrop never drops {layers} whose attention map others use"
    return dataclasses.replace(
        program,
        layerdrop={path: p for path, p in program.layerdrop.items() if path not in kept},
        notes=(*program.notes, Note("layerdrop", kept[0], text)),
    )
