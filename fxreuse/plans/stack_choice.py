"""Which stack of a model a plan is laid over, and what to say where that is not clear."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping

from ..attention import AttentionSites
from ..errors import PlanError
from .groups import Groups, Open, count_layers, describe_fitting, fitting
from .groups_text import parse_groups
from .plan import Reuse
from .plan_fiak import Fiak
from .plan_options import Match
from .plan_weights import Residual, Share

_Step = Reuse | Share | Residual | Fiak


def choose_stack(step: Reuse | Share | Residual, stacks: Mapping[str, int]) -> tuple[str, tuple[int, ...]]:
    """The stack that a pass is laid over, and the leader of each of its layers.

    Args:
        step: the pass; it has groups. Its ``stack`` may be a name or whatever part of a name only one stack has: how it
            begins, some of its dotted components, or any piece of it, in this order.
        stacks: the number of layers of every stack.

    Raises:
        PlanError: no such stack, none or several that fit, or another number of layers.

    >>> from fxreuse import Plan
    >>> choose_stack(Plan.parse("2x*").passes[0], {"encoder.layer.{i}·self": 3})
    ('encoder.layer.{i}·self', (0, 0, 2))
    """
    groups = step.groups
    assert groups is not None
    _check_any(step, stacks)
    name = _fitting_stack(step, groups, stacks) if step.stack is None else _named_stack(step, step.stack, stacks)
    layers = stacks[name]
    if not groups.fits(layers):
        raise PlanError(
            f"plan {str(step)!r} is for {groups.extent}, found {count_layers(layers)} in stack {name}; "
            f"plans for {count_layers(layers)}: {_offered(step, layers)}"
        )
    matched = step.ffn.groups if isinstance(step, Reuse) and isinstance(step.ffn, Match) else None
    if matched is not None and not matched.fits(layers):
        raise PlanError(
            f"plan {str(step)!r}: ffn=match:{matched} is for {matched.extent}, found {count_layers(layers)} in stack "
            f"{name}; {describe_fitting(layers)}"
        )
    return name, groups.leaders(layers)


def choose_named_stack(step: _Step, stacks: Mapping[str, int]) -> str:
    """The stack that a pass without groups is laid over: the one that it names, or the only one.

    Raises:
        PlanError: no such stack, or several.

    >>> choose_named_stack(Residual(16), {"layers.{i}·self": 3})
    'layers.{i}·self'
    """
    _check_any(step, stacks)
    if step.stack is not None:
        return _named_stack(step, step.stack, stacks)
    if len(stacks) > 1:
        raise PlanError(
            f"plan {str(step)!r}: the model has {len(stacks)} stacks; say which, as in "
            f"{_with_stack(step, next(iter(stacks)))!r}; they are\n" + _table(step, stacks)
        )
    return next(iter(stacks))


def choose_stack_of_self_attention(fiak: Fiak, sites: AttentionSites) -> str:
    """The stack whose keys get priors.

    Raises:
        PlanError: there is none, several, or none of the name that is given.
    """
    stacks = {name: len(members) for name, members in sites.stacks.items() if members[0].kind == "self"}
    if not stacks:
        raise PlanError(f"plan {str(fiak)!r}: the model has no stack of self-attentions whose keys could have priors")
    return choose_named_stack(fiak, stacks)


def _check_any(step: _Step, stacks: Mapping[str, int]) -> None:
    if not stacks:
        raise PlanError(f"plan {str(step)!r}: the model has no stack of attentions to lay it over")


def _named_stack(step: _Step, wanted: str, stacks: Mapping[str, int]) -> str:
    """The one stack that a name means."""
    if wanted in stacks:
        return wanted
    prefixed = [name for name in stacks if name.startswith(wanted)]
    component = [name for name in stacks if f".{wanted}." in f".{name}.".replace("·", ".")]
    containing = [name for name in stacks if wanted in name]
    for matches in (prefixed, component, containing):
        if len(matches) == 1:
            return matches[0]
    if containing:
        raise PlanError(
            f"plan {str(step)!r}: stack={wanted} may mean any of these stacks; give more of the name, as in "
            f"{_with_stack(step, containing[0])!r}\n" + _table(step, {name: stacks[name] for name in containing})
        )
    pieces = {piece: name for name in stacks for piece in (name, *re.split(r"[.·]", name))}
    near = difflib.get_close_matches(wanted, pieces, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise PlanError(f"plan {str(step)!r}: no stack is called {wanted}{hint}; the stacks are\n" + _table(step, stacks))


def _fitting_stack(step: _Step, groups: Groups, stacks: Mapping[str, int]) -> str:
    """The only stack that the groups fit, or the only one there is."""
    fits = [name for name, layers in stacks.items() if groups.fits(layers)]
    if len(stacks) == 1:
        return next(iter(stacks))
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise PlanError(
            f"plan {str(step)!r} fits {len(fits)} stacks; say which, as in {_with_stack(step, fits[0])!r}; they are\n"
            + _table(step, {name: stacks[name] for name in fits})
        )
    raise PlanError(
        f"plan {str(step)!r} is for {groups.extent}; no stack has as many; the stacks are\n" + _table(step, stacks)
    )


def _with_stack(step: _Step, name: str) -> str:
    return str(dataclasses.replace(step, stack=name))


def _table(step: _Step, stacks: Mapping[str, int]) -> str:
    """A line for each stack: its name, its layers, and plans that fit."""
    rows = [f"  {name}: {count_layers(layers)}, takes {_offered(step, layers)}" for name, layers in stacks.items()]
    return "\n".join(rows)


def _offered(step: _Step, layers: int) -> str:
    """Plans of the pass's own kind that a stack of so many layers takes.

    >>> from fxreuse import Plan
    >>> _offered(Plan.parse("share 2+3 bias=own").passes[0], 6)
    'share k=2 bias=own, share k=3 bias=own, share k=6 bias=own, share 2+4 bias=own'
    >>> _offered(Plan.parse("residual 2+3 r=4").passes[0], 3), _offered(Plan.parse("5x2").passes[0], 6)
    ('residual k=3 r=4, residual 2+1 r=4', '2x3, 3x2, 6x1, 2x*')
    """
    if not isinstance(step, (Share, Residual)) or step.groups is None:
        return ", ".join(fitting(layers)) or "none"
    sizes = [size for size in range(2, layers + 1) if layers % size == 0][:3]
    groups = [*map(Open, sizes), *([parse_groups(f"2+{layers - 2}")] if layers > 2 else [])]
    return ", ".join(str(dataclasses.replace(step, groups=one, stack=None)) for one in groups) or "none"
