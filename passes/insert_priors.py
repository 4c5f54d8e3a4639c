"""Priors on the keys of attentions, added to their scores (FiAK, Definition 1)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import sympy
import torch
from torch import fx

from fxreuse.attention import AttentionSite
from fxreuse.errors import UnsupportedError
from fxreuse.finding.axes import Layout, Part
from fxreuse.finding.flow import Flow
from fxreuse.frontend.lengths import length_bounds
from fxreuse.layouts.projections import take_place
from fxreuse.nodes import inserting_before
from fxreuse.plans.plan_fiak import Fiak
from fxreuse.priors.admissible import admissible_pairs
from fxreuse.priors.priors import initial_prior, log_prior
from fxreuse.program import Program
from fxreuse.tree import free_path

from .arrange import Arranger, Insert, Term, UnclearAxes
from .fused import OPERATOR, Fused
from .new_tensors import free_sizes, input_of_length, leading, put_tensor, read_tensor
from .pinned import is_pinned
from .score_axes import ScoreAxes, score_axes, softmax_at

_aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class SitePrior:
    """The prior of one site: the path of its parameter, and which pairs of a query and a key it is over.

    ``admissible`` is (queries, keys), True where the masks that depend on no input let a query see a key. ``causal``
    says that no query sees a key behind it. ``width`` is what a score costs in multiply-accumulates, in the product of
    queries and keys and in that with the values. ``kept`` is the path of the buffer that says which pairs are left,
    where some were pruned and the prior is still trained.
    """

    site: str
    stack: str
    layer: int
    heads: int
    parameter: str
    admissible: torch.Tensor
    causal: bool
    width: int
    plan: Fiak
    kept: str | None = None


def insert_priors(program: Program, sites: Sequence[AttentionSite], plan: Fiak) -> tuple[Program, list[SitePrior]]:
    """Give every site a prior, a Parameter, and add its logarithm to the scores. Architecture tier.

    Sound because a softmax of the scores plus log|π| is the posterior |π_ij|·exp(s_ij) / Σ_j |π_ij|·exp(s_ij), under
    whatever masks, biases and dropout the attention has; and because the uniform prior that it starts from adds zeros.

    Arguments:
        program: a normalised program whose lengths are fixed or bounded; it is not changed.
        sites: sites of self-attention.
        plan: what kind of prior, and whether each head has its own.

    Returns:
        A program in which the nodes of the sites have the same names, and the priors.

    Raises:
        UnsupportedError: the axes of some scores cannot be told, or their softmax is over more than keys.
    """
    program = program.copy()
    inserter = _Inserter(program, plan)
    with free_sizes():
        priors = [inserter.insert(site) for site in sites]
    program.module.recompile()
    program.check()
    return program, priors


class _Inserter:
    def __init__(self, program: Program, plan: Fiak) -> None:
        self._program, self._plan = program, plan
        self._flow = Flow(program)  # of the graph as it was: what is inserted is read by nobody's queries and keys
        self._bounds = length_bounds(program)

    def insert(self, site: AttentionSite) -> SitePrior:
        axes = score_axes(self._program, site, self._flow)
        queries, keys = (self._length(site, value) for value in site.map_shape[2:])
        admissible = admissible_pairs(self._program, site, self._flow, (queries, keys), self._bounds)
        node = self._program.node(site.nodes.map) if site.fused else softmax_at(self._program, site).scores
        path = self._new_parameter(site, node, queries, keys)
        try:
            (self._add_to_fused if site.fused else self._add_to_scores)(node, axes, path, queries)
        except UnclearAxes as unclear:
            raise UnsupportedError(f"{site}: cannot tell where a prior is to be added: {unclear}") from unclear
        return SitePrior(
            str(site),
            site.stack,
            site.layer,
            site.heads,
            path,
            admissible,
            "causal" in site.mask.split("+") and queries == keys,
            site.head_dim + site.value_dim,
            self._plan,
        )

    def _length(self, site: AttentionSite, value: object) -> int:
        known = sympy.sympify(value).xreplace({symbol: sympy.Integer(n) for symbol, n in self._bounds.items()})
        assert known.is_Integer, f"{site} has a length without a bound: {value}"
        return int(known)

    def _new_parameter(self, site: AttentionSite, like: fx.Node, queries: int, keys: int) -> str:
        """A prior in the tree, at a new path in the module of the site."""
        shape = (keys,) if self._plan.prior == "mixture" else (queries, keys)
        shape = (site.heads, *shape) if self._plan.per_head else shape
        value = like.meta["val"]
        path = free_path(self._program.module, site.path, "prior")
        prior = initial_prior(shape, self._plan.prior, dtype=value.dtype, device=value.device)
        put_tensor(self._program, path, torch.nn.Parameter(prior))
        return path

    def _logarithm(self, insert: Insert, before: fx.Node, axes: ScoreAxes, path: str, queries: int) -> fx.Node:
        """What is added to the scores, in their layout."""
        count = queries if self._plan.prior == "mixture" else None
        value = insert(log_prior, read_tensor(self._program, path, before), None, count)
        places = [axes.of("heads")] if self._plan.per_head else []
        places += [axes.of("queries"), axes.of("keys")]
        for dim, parts in enumerate(places, start=-len(places)):
            if math.prod(part.size for part in parts) != value.meta["val"].shape[dim]:
                length = input_of_length(self._program, math.prod(part.size for part in parts), queries)
                value = leading(insert, value, dim, insert(_aten.sym_size.int, *length))
        arranger = Arranger([axes.layout])
        return arranger.arrange(insert, Term(value, _without_ones(places)), _without_ones(axes.layout))

    def _add_to_scores(self, scores: fx.Node, axes: ScoreAxes, path: str, queries: int) -> None:
        readers = [node for node in self._program.graph.nodes if node in scores.users and node.op != "output"]
        with inserting_before(readers[0]) as insert:
            added = self._logarithm(insert, readers[0], axes, path, queries)
            if added.meta["val"].dtype != scores.meta["val"].dtype or is_pinned(scores):
                added = insert(_aten.type_as.default, added, scores)
            made = insert(_aten.add.Tensor, scores, added)
        for reader in readers:
            reader.replace_input_with(scores, made)

    def _add_to_fused(self, node: fx.Node, axes: ScoreAxes, path: str, queries: int) -> None:
        fused = Fused.of(node)
        with inserting_before(node) as insert:
            added = self._logarithm(insert, node, axes, path, queries)
            added = insert(_aten.type_as.default, added, fused.query)
            mask = _joined(insert, fused, added)
            made = insert(
                OPERATOR,
                fused.query,
                fused.key,
                fused.value,
                mask,
                fused.dropout_p,
                False,
                scale=fused.scale,
                enable_gqa=fused.enable_gqa,
            )
        take_place(made, node)


def _joined(insert: Insert, fused: Fused, added: fx.Node) -> fx.Node:
    """A mask of a fused attention that adds something to the scores beside what its own masks do."""
    if fused.mask is not None:
        if fused.mask.meta["val"].dtype is torch.bool:
            added = insert(_aten.masked_fill.Scalar, added, insert(_aten.logical_not.default, fused.mask), -math.inf)
        else:
            added = insert(_aten.add.Tensor, added, fused.mask)
    if fused.is_causal:
        lengths = [insert(_aten.sym_size.int, operand, -2) for operand in (fused.query, fused.key)]
        ones = insert(_aten.new_ones.default, fused.query, lengths, dtype=torch.bool)
        added = insert(_aten.masked_fill.Scalar, added, insert(_aten.triu.default, ones, 1), -math.inf)
    return added


def _without_ones(layout: Sequence[tuple[Part, ...]]) -> Layout:
    return tuple(tuple(part for part in dim if part.size != 1) for dim in layout)


def logarithm_of(program: Program, prior: SitePrior) -> fx.Node:
    """The node that makes of a prior what is added to the scores."""
    for node in program.graph.nodes:
        if node.target is log_prior and node.args[0].target == prior.parameter:
            return node
    raise AssertionError(f"nothing reads {prior.parameter}")
