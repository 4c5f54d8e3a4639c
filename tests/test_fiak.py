"""Priors on keys, and pruning by them, against the models run eagerly with the same added to their scores."""

from __future__ import annotations

import copy
import functools
import io
import math
import warnings

import pytest
import torch
from torch import nn

import fxreuse
from fxreuse import PlanError, UnsupportedError
from fxreuse.cost_model import summarise
from fxreuse.finding.find import find
from fxreuse.frontend.load import load_program
from fxreuse.priors.priors import log_prior

from .fiak_models import (
    DIM,
    HEADS,
    KINDS,
    LENGTH,
    Attention,
    Causal,
    FusedProjection,
    Grouped,
    Layers,
    LengthsLeftOut,
    LowRank,
    Rotary,
    Typed,
    Unfused,
    Windowed,
    build,
)
from .running import apply_captured, assert_same, assert_same_gradients, gradients

EXACT = 1e-12


built = functools.cache(build)


@functools.cache
def program(kind: type[Attention], layers: int, fixed: bool = False):
    """A model's program, with its lengths free or fixed."""
    return load_program(*built(kind, layers), only_free=frozenset({("x", 0)}) if fixed else None)


@functools.cache
def captured(kind: type[Attention], plan: str = "fiak", layers: int = 1):
    """A model, its inputs, and the model with priors; tests leave all three as they are."""
    model, x = built(kind, layers)
    fixed = functools.partial(program, kind, layers, fixed=True)
    return model, x, apply_captured(model, program(kind, layers), plan, x, fixed=fixed)


def with_random_priors(weighed: nn.Module, seed: int = 0) -> nn.Module:
    """A copy whose priors are drawn at random, of both signs."""
    generator = torch.Generator().manual_seed(seed)
    weighed = copy.deepcopy(weighed)
    for name, parameter in weighed.named_parameters():
        if name.endswith("prior"):
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return weighed


def priors_of(weighed: nn.Module) -> list[torch.Tensor]:
    return [parameter for name, parameter in weighed.named_parameters() if name.endswith("prior")]


def reference(model: Layers, extras: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The model run eagerly with something added to the scores of every layer."""
    model = copy.deepcopy(model)
    for attention, extra in zip(model.attentions, extras, strict=True):
        attention.extra = extra
    return model(x)


def cut(pruned: nn.Module, model: Layers, weighed: nn.Module, **fractions: float) -> list[torch.Tensor]:
    """What the pruning hides of every layer, as numbers added to its scores; chosen anew, from the priors."""
    from fxreuse.priors.selection import select

    extras = []
    for prior, attention in zip(priors_of(weighed), model.attentions, strict=True):
        seen = torch.ones(prior.shape[-2:], dtype=torch.bool)
        seen = seen.tril() if attention.causal else seen
        seen = seen.tril().triu(-3) if isinstance(attention, Windowed) else seen
        magnitude = prior.detach().abs().reshape(-1, *prior.shape[-2:])
        causal = attention.causal or isinstance(attention, Windowed)
        kept = select(magnitude, seen, causal=causal, **fractions)
        extras.append(torch.zeros(kept.scores.shape).double().masked_fill(~kept.scores, -math.inf))
    return extras


@pytest.mark.parametrize("kind", KINDS)
def test_a_uniform_prior_is_the_baseline_in_value_and_gradient(kind):
    model, x, weighed = captured(kind)
    assert_same(weighed(x), model(x), EXACT)
    expected = gradients(model, model(x))
    found = gradients(weighed, weighed(x))
    assert_same_gradients({name: found[name] for name in expected}, expected, 1e-10)
    for prior in priors_of(weighed):
        torch.testing.assert_close(prior.data, torch.full_like(prior, LENGTH**-0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prior_weighs_the_exponentials(kind):
    model, x, weighed = captured(kind)
    weighed = with_random_priors(weighed)
    assert_same(weighed(x), reference(model, [prior.abs().log() for prior in priors_of(weighed)], x), EXACT)


@pytest.mark.parametrize(
    ("kind", "fractions"),
    [(kind, (0.4, 0.25)) for kind in KINDS]
    + [(kind, fractions) for kind in (Causal, Unfused) for fractions in ((0.4, 0.0), (0.0, 0.25))],
)
def test_pruned_is_dense_with_minus_infinity(kind, fractions):
    model, x, weighed = captured(kind)
    weighed = with_random_priors(weighed)
    scores, keys = fractions
    pruned = fxreuse.prune(weighed, scores=scores, keys=keys)
    extras = cut(pruned, model, weighed, scores=scores, keys=keys)
    expected = reference(model, extras, x)
    assert_same(pruned(x), expected, EXACT)
    model = copy.deepcopy(model)
    for attention, extra in zip(model.attentions, extras, strict=True):
        attention.extra = extra
    wanted = gradients(model, model(x))
    assert_same_gradients(
        gradients(pruned, pruned(x)), {name: wanted[name] for name, _ in pruned.named_parameters()}, 1e-9
    )
    assert not priors_of(pruned)
    for site, extra in zip(fxreuse.describe(pruned).pruned, extras, strict=True):
        assert site.scores_kept == int((extra == 0).sum()) * HEADS // len(extra)
        assert site.keys_kept == LENGTH - math.floor(keys * LENGTH)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (LengthsLeftOut, Windowed)])
def test_keys_are_cut_before_they_are_projected(kind):
    pruned = fxreuse.prune(with_random_priors(captured(kind)[2]), keys=0.25)
    macs = summarise(pruned.program).macs
    dense = summarise(program(kind, 1)).macs
    sizes = {symbol: {"B": 1, "T": LENGTH}[str(symbol)] for symbol in macs.free_symbols | dense.free_symbols}
    projected = {Grouped: DIM // HEADS, LowRank: DIM + 6}.get(kind, DIM), DIM // HEADS if kind is Grouped else DIM
    saved = 3 * (DIM * sum(projected) + 2 * LENGTH * DIM)  # three keys
    assert (dense - macs).xreplace(sizes) == saved


@pytest.mark.parametrize("kind", [FusedProjection, Causal])
@pytest.mark.parametrize("scores", [0.0, 0.5])
def test_keys_fill_the_vectors_of_the_kernel(kind, scores):
    model, weighed = captured_long(kind)
    x = torch.randn(2, 40, DIM).double()
    pruned = fxreuse.prune(weighed, scores=scores, keys=0.25)
    assert_same(pruned(x), reference(model, cut(pruned, model, weighed, scores=scores, keys=0.25), x), EXACT)
    (site,) = fxreuse.describe(pruned).pruned
    assert (site.keys_kept, site.repeated, site.computed) == (30, 2, HEADS * 40 * 32)
    if kind is Causal:
        for length in (1, 13):
            assert_same(pruned(x[:, :length]), pruned(x)[:, :length], EXACT)
    else:
        work = summarise(pruned.program, pruned=[site]).at(B=1)
        cut_keys = 10 * (2 * DIM**2 + 2 * 40 * DIM)
        cut_scores = 2 * DIM * (30 * 40 - site.scores_kept // HEADS)
        dense = 40 * 5 * DIM**2 + 2 * 40**2 * DIM
        assert work.macs_algorithmic == dense - cut_keys - cut_scores
        assert work.macs == dense - cut_keys + 2 * (2 * DIM**2 + 2 * 40 * DIM)


@functools.cache
def captured_long(kind):
    """A model, and with random priors over a length at which vectors are filled."""
    model, _ = built(kind, 1)
    return model, with_random_priors(fxreuse.apply(model, "fiak", torch.randn(2, 40, DIM).double()))


@pytest.mark.parametrize("kind", [FusedProjection, Causal])
@pytest.mark.parametrize("options", [" prior=mixture", " per_head=yes", " prior=mixture per_head=yes"])
def test_kinds_of_priors(kind, options):
    model, x, weighed = captured(kind, f"fiak{options}")
    assert_same(weighed(x), model(x), EXACT)
    weighed = with_random_priors(weighed)
    mixture, per_head = "mixture" in options, "per_head" in options
    shape = ((HEADS,) if per_head else ()) + (() if mixture else (LENGTH,)) + (LENGTH,)
    assert all(prior.shape == shape for prior in priors_of(weighed))
    extras = [prior.abs().log() for prior in priors_of(weighed)]
    if mixture:
        extras = [extra.unsqueeze(-2).expand(*extra.shape[:-1], LENGTH, LENGTH) for extra in extras]
    assert_same(weighed(x), reference(model, extras, x), EXACT)
    pruned = fxreuse.prune(weighed, keys=0.25)
    weights = [prior.abs().sum(0) if per_head and mixture else prior.abs() for prior in priors_of(weighed)]
    if mixture:
        first = [
            torch.tensor([math.inf if kind is Causal else 0.0] + [0.0] * (LENGTH - 1)).double() + w for w in weights
        ]
        kept = [torch.zeros(LENGTH, dtype=torch.bool).scatter(0, w.argsort(descending=True)[:9], True) for w in first]
        hidden = [torch.zeros(LENGTH, LENGTH).double().masked_fill(~k, -math.inf) for k in kept]
        assert_same(pruned(x), reference(model, hidden, x), EXACT)
    else:
        assert_same(pruned(x), reference(model, cut(pruned, model, weighed, keys=0.25), x), EXACT)


@pytest.mark.parametrize("kind", [Causal, Rotary, Unfused, Windowed])
def test_pruning_nothing_gives_the_baseline(kind):
    model, x, weighed = captured(kind)
    pruned = fxreuse.prune(with_random_priors(weighed), scores=0.0, keys=0.0)
    assert_same(pruned(x), model(x), EXACT)
    assert set(pruned.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("lowering", ["gather", "flex"])
@pytest.mark.parametrize(("kind", "fractions"), [(FusedProjection, (0.4, 0.0)), (Causal, (0.4, 0.25))])
def test_blocks_are_skipped_with_the_value_of_the_mask(kind, fractions, lowering):
    model, x, weighed = captured(kind, "fiak block=3 per_head=yes")
    weighed = with_random_priors(weighed)
    scores, keys = fractions
    masked = fxreuse.prune(weighed, scores=scores, keys=keys, lowering="mask")
    pruned = fxreuse.prune(weighed, scores=scores, keys=keys, lowering=lowering)
    assert_same(pruned(x), masked(x), EXACT)
    assert_same(masked(x), reference(model, cut(masked, model, weighed, scores=scores, keys=keys, block=3), x), EXACT)
    assert_same_gradients(gradients(pruned, pruned(x)), gradients(masked, masked(x)), 1e-9)
    for site in fxreuse.describe(pruned).pruned:
        assert site.skipped_share == 1
        assert site.lowering == lowering
    assert all(site.skipped_share < 1 for site in fxreuse.describe(masked).pruned)


def test_shorter_inputs_of_a_causal_model_use_the_leading_part():
    _, x, weighed = captured(Causal)
    weighed = with_random_priors(weighed)
    whole = weighed(x)
    for length in (1, 5, LENGTH):
        assert_same(weighed(x[:, :length]), whole[:, :length], EXACT)
    for options in ({"scores": 0.4, "keys": 0.25}, {"scores": 0.4}, {"keys": 0.5}):
        pruned = fxreuse.prune(weighed, **options)
        whole_pruned = pruned(x)
        for length in (1, 4, LENGTH):
            assert_same(pruned(x[:, :length]), whole_pruned[:, :length], EXACT)
    with pytest.raises(fxreuse.InputError, match=r"dimension 1 must be at most 12; found x.shape\[1\] = 13"):
        weighed(torch.randn(3, LENGTH + 1, DIM).double())


def test_other_models_have_their_length_fixed_and_say_so():
    _, x, weighed = captured(Attention)
    assert weighed(torch.cat((x, x))).shape == (6, LENGTH, DIM)
    assert any(note.kind == "size" and "dimension 1 = 12" in note.text for note in fxreuse.describe(weighed).notes)
    for length in (LENGTH - 1, LENGTH + 1):
        with pytest.raises(fxreuse.InputError, match="dimension 1 must be 12"):
            weighed(torch.randn(3, length, DIM).double())


def test_tokens_may_stand_before_the_batch():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, dropout=0.0, batch_first=False)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    first = copy.deepcopy(model).eval()
    for module in first.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.batch_first = True
    x = torch.randn(LENGTH, 3, DIM).double()
    weighed = with_random_priors(fxreuse.apply(model.eval(), "fiak", x))
    expected = with_random_priors(fxreuse.apply(first, "fiak", x.transpose(0, 1)))
    assert [prior.shape for prior in priors_of(weighed)] == [(LENGTH, LENGTH)] * 2
    for batch in (3, 4):
        x = torch.randn(LENGTH, batch, DIM).double()
        assert_same(weighed(x), expected(x.transpose(0, 1)).transpose(0, 1), EXACT)
        pruned, wanted = (fxreuse.prune(one, scores=0.4, keys=0.25) for one in (weighed, expected))
        assert_same(pruned(x), wanted(x.transpose(0, 1)).transpose(0, 1), EXACT)
    with pytest.raises(fxreuse.InputError, match="dimension 0 must be 12"):
        weighed(torch.randn(LENGTH + 1, 3, DIM).double())


def test_the_gradient_of_priors_is_that_of_finite_differences():
    prior = torch.randn(2, 4, 4).double().requires_grad_()
    scores = torch.randn(3, 2, 4, 4).double()
    torch.autograd.gradcheck(lambda pi: torch.softmax(scores + log_prior(pi), -1), prior)
    mixture = torch.randn(4).double().requires_grad_()
    torch.autograd.gradcheck(lambda pi: torch.softmax(scores + log_prior(pi, queries=4), -1), mixture)


def test_a_prior_of_zero_gives_no_weight_and_no_nan():
    prior = torch.tensor([[0.0, 0.5], [0.5, 0.5]], requires_grad=True)
    weights = torch.softmax(torch.zeros(2, 2) + log_prior(prior), -1)
    weights[0, 1].backward()
    torch.testing.assert_close(weights[0], torch.tensor([0.0, 1.0]))
    assert torch.isfinite(prior.grad).all()


def test_pairs_that_no_query_sees_get_no_gradient():
    _, x, weighed = captured(Causal)
    found = gradients(weighed, weighed(x))
    for name, gradient in found.items():
        if name.endswith("prior"):
            assert gradient.tril().abs().sum() > 0
            assert (gradient.triu(1) == 0).all()


@pytest.mark.parametrize(
    ("kind", "lowering"),
    [(FusedProjection, "materialize"), (Causal, "recompute"), (Unfused, "materialize"), (Unfused, "recompute")],
)
def test_followers_share_the_pruned_map_of_their_leader(kind, lowering):
    model, x, weighed = captured(kind, f"fiak | 2x2 lowering={lowering}", layers=4)
    weighed = with_random_priors(weighed)
    assert len(priors_of(weighed)) == 2
    for fractions in ({"scores": 0.0, "keys": 0.0}, {"scores": 0.4}, {"scores": 0.4, "keys": 0.25}):
        pruned = fxreuse.prune(weighed, **fractions)
        extras = [torch.zeros(1)] * 4
        shown = copy.deepcopy(model)
        shown.layers = nn.ModuleList(shown.layers[i] for i in (0, 2))
        extras[0], extras[2] = cut(pruned, shown, weighed, **fractions)
        assert_same(pruned(x), _shared(model, extras, x), EXACT)
        assert [site.layer for site in fxreuse.describe(pruned).pruned] == [0, 2]


def _shared(model: Layers, extras: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The model with maps shared in pairs, something added to the scores of the leaders."""
    leading: torch.Tensor | None = None
    for index, (attention, feed_forward, norm) in enumerate(model.layers):
        q, k, v = attention.operands(norm(x))
        if index % 2 == 0:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + extras[index]
            mask = attention.mask(x)
            scores = scores if mask is None else scores + mask
            if attention.causal:
                scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
            leading = torch.softmax(scores, -1)
        x = x + attention.o((leading @ v).transpose(1, 2).flatten(2))
        x = x + feed_forward(x).tanh()
    return x


def test_layers_whose_heads_were_pruned_before():
    class Thin(Attention):
        """Of its two heads one is left."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(DIM, DIM // 2) for _ in range(3))
            self.o = nn.Linear(DIM // 2, DIM)

    model, x = build(Attention)
    torch.manual_seed(3)
    model.layers[1][0] = Thin().double()
    for plan, keys in (("fiak", 0.25), ("fiak per_head=yes", 0.25)):
        weighed = with_random_priors(fxreuse.apply(model, plan, x))
        assert [len(p) if p.dim() == 3 else 0 for p in priors_of(weighed)] == ([2, 1] if "head" in plan else [0, 0])
        pruned = fxreuse.prune(weighed, scores=0.5, keys=keys)
        assert_same(pruned(x), reference(model, cut(pruned, model, weighed, scores=0.5, keys=keys), x), EXACT)
        assert [site.scores for site in fxreuse.describe(pruned).pruned] == [288, 144]


def test_pruning_by_what_the_plan_says():
    weighed = captured(FusedProjection, "fiak scores=0.5 keys=0.25")[2]
    assert [(s.keys_kept, s.scores_kept) for s in fxreuse.describe(fxreuse.prune(weighed)).pruned] == [(9, 144)]


def saved(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(model, stream)
        stream.seek(0)
        return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("kind", [FusedProjection, Unfused, Typed, Windowed, LengthsLeftOut])
def test_pruning_after_copies_pickles_training_and_conversion(kind):
    _, x, weighed = captured(kind)
    weighed = with_random_priors(weighed).train(kind is not Unfused)  # which has dropout
    optimizer = torch.optim.Adam(weighed.parameters(), 0.01)
    torch.manual_seed(0)
    weighed(x).square().sum().backward()
    optimizer.step()
    weighed.eval()
    expected = fxreuse.prune(weighed, scores=0.4, keys=0.25)
    for other in (copy.deepcopy(weighed), saved(weighed), saved(copy.deepcopy(weighed))):
        assert_same(fxreuse.prune(other, scores=0.4, keys=0.25)(x), expected(x))
    again = saved(expected)
    assert_same(again(x), expected(x))
    assert_same(
        fxreuse.prune(copy.deepcopy(weighed).float(), scores=0.4, keys=0.25)(x.float()), expected(x).float(), 1e-5
    )
    assert fxreuse.prune(weighed.train(), keys=0.25).training


def test_pruning_leaves_the_model_as_it_was_and_shares_its_parameters():
    _, x, weighed = captured(FusedProjection)
    weighed = with_random_priors(weighed)
    before = weighed(x)
    pruned = fxreuse.prune(weighed, keys=0.25)
    assert_same(weighed(x), before)
    names = dict(weighed.named_parameters())
    assert all(names[name] is parameter for name, parameter in pruned.named_parameters())


def test_a_schedule_prunes_further_at_every_step_and_what_is_cut_stays_cut():
    _, x, weighed = captured(Causal)
    current = with_random_priors(weighed)
    counts = []
    for step in fxreuse.prune_schedule(scores=0.5, keys=0.25, steps=3):
        cut_before = [b.clone() for name, b in current.named_buffers() if name.endswith("kept")]
        current = step(current)
        kept = [b for name, b in current.named_buffers() if name.endswith("kept")]
        counts.append(sum(int(b.sum()) for b in kept))
        if step.final:
            break
        assert all(not (new & ~old).any() for new, old in zip(kept, cut_before, strict=False))
        for prior, mask in zip(priors_of(current), kept, strict=True):
            found = gradients(current, current(x))
            assert all((found[n][~mask] == 0).all() for n, p in current.named_parameters() if p is prior)
            with torch.no_grad():
                prior.mul_(torch.rand_like(prior) + 0.5)
    assert counts[0] > counts[1] > 0
    assert not priors_of(current)
    assert all(site.keys_kept == 9 for site in fxreuse.describe(current).pruned)


@pytest.mark.parametrize("options", ["", " per_head=yes", " prior=mixture", " prior=mixture per_head=yes"])
def test_what_a_step_cut_stays_cut_where_the_next_one_cuts_less(options):
    _, x, weighed = captured(Causal, f"fiak{options}")
    scores = 0.0 if "mixture" in options else 0.5
    masked = fxreuse.prune(with_random_priors(weighed), scores=scores, keys=0.25, final=False)
    for prior in priors_of(masked):
        prior.data.fill_(1.0)
    assert_same(fxreuse.prune(masked, scores=0, keys=0)(x), masked(x), EXACT)


def test_a_pruned_model_compiles_as_one_graph():
    _, x, weighed = captured(FusedProjection)
    for options in ({"scores": 0.4, "keys": 0.25}, {"keys": 0.25}):
        pruned = fxreuse.prune(with_random_priors(weighed), **options)
        compiled = torch.compile(pruned, fullgraph=True, backend="eager")
        assert_same(compiled(x), pruned(x), EXACT)
    compiled = torch.compile(weighed, fullgraph=True, backend="eager")
    assert_same(compiled(x), weighed(x), EXACT)


def test_inside_a_host():
    host = nn.Sequential(build(Attention)[0], nn.Linear(DIM, 2).double())
    x = build(Attention)[1]
    expected = host(x)
    weighed = fxreuse.apply(host, "fiak", x, target="0")
    assert_same(weighed(x), expected, EXACT)
    assert fxreuse.prune(weighed, keys=0.25) is host
    assert [site.keys_kept for site in fxreuse.describe(host).pruned] == [9, 9]


def test_models_without_priors():
    model, x, weighed = captured(FusedProjection)
    with pytest.raises(fxreuse.FxReuseError, match=r"Layers was not made by fxreuse\.apply, and has no priors"):
        fxreuse.prune(model)
    with pytest.raises(fxreuse.FxReuseError, match="has no priors to prune by"):
        fxreuse.prune(apply_captured(model, program(FusedProjection, 1), "1x1", x))
    pruned = fxreuse.prune(weighed, keys=0.25)
    with pytest.raises(fxreuse.FxReuseError, match="was pruned already"):
        fxreuse.prune(pruned, keys=0.5)


def test_what_cannot_be_pruned():
    weighed = captured(FusedProjection)[2]
    mixture = captured(FusedProjection, "fiak prior=mixture")[2]
    with pytest.raises(PlanError, match="needs a prior for every query and key"):
        fxreuse.prune(mixture, scores=0.5)
    with pytest.raises(PlanError, match=r"at least 0 and below 1, found 1\.5"):
        fxreuse.prune(weighed, scores=1.5)
    with pytest.raises(PlanError, match=r"layers.0.0: of 144 scores 2 would be left, fewer than the 12 queries"):
        fxreuse.prune(weighed, scores=0.99)
    with pytest.raises(PlanError, match="skips whole blocks of scores; say how large"):
        fxreuse.prune(weighed, scores=0.5, lowering="flex")
    unfused = captured(Unfused, "fiak block=3")[2]
    with pytest.raises(UnsupportedError, match=r"lowering=gather needs a fused attention"):
        fxreuse.prune(unfused, scores=0.4, lowering="gather")
    with pytest.raises(PlanError, match="priors twice"):
        captured(FusedProjection, "fiak | fiak")


def test_exported_programs_need_a_length_that_is_known():
    model, x = build(Causal)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    free = torch.export.export(model, (x,), dynamic_shapes=({0: batch, 1: length},))
    with pytest.raises(PlanError, match=r"x.shape\[1\] of this exported program is dynamic without a bound"):
        fxreuse.apply(free, "fiak")
    bounded = torch.export.export(model, (x,), dynamic_shapes=({0: batch, 1: torch.export.Dim("length", max=20)},))
    weighed = fxreuse.apply(bounded, "fiak")
    assert [prior.shape for prior in priors_of(weighed)] == [(20, 20)] * 2
    assert_same(weighed(x), model(x), EXACT)
    plain, x = build(Attention)
    program = torch.export.export(plain, (x,), dynamic_shapes=({0: batch, 1: length},))
    with pytest.raises(PlanError, match="is dynamic, and its attention is not causal"):
        fxreuse.apply(program, "fiak")


def test_find_sees_the_sites_of_what_comes_out():
    _, x, weighed = captured(FusedProjection)
    assert [site.bias != "none" for site in find(load_program(weighed, x))] == [True]
    pruned = fxreuse.prune(weighed, keys=0.25)
    assert [str(site.map_shape[-1]) for site in find(load_program(pruned, x))] == ["9"]


def test_beside_shared_weights_with_residuals():
    _, x, shared = captured(Attention, "residual k=2 r=4", layers=2)
    weighed = captured(Attention, "fiak | residual k=2 r=4", layers=2)[2]
    assert_same(weighed(x), shared(x), EXACT)
    weighed = with_random_priors(weighed)
    assert_same(fxreuse.prune(weighed, scores=0, keys=0)(x), shared(x), EXACT)
    pruned = fxreuse.prune(weighed, scores=0.5, keys=0.25)
    masked = fxreuse.prune(weighed, scores=0.5, keys=0.25, final=False)
    for prior in priors_of(masked):
        prior.data.fill_(1.0)
    assert_same(pruned(x), masked(x), EXACT)
    assert [site.keys_kept for site in fxreuse.describe(pruned).pruned] == [9, 9]
