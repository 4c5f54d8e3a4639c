"""Share and residual passes: reading, writing; messages word by word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxreuse.errors import PlanError
from fxreuse.plans.groups import Leaders, Open, Run, Sizes, Uniform
from fxreuse.plans.plan import Plan, Reuse
from fxreuse.plans.plan_weights import Residual, Share
from fxreuse.plans.stack_choice import choose_named_stack, choose_stack

SHARE = "share takes k=3 or groups such as 3+3+2, stack=NAME, bias=shared|own, init=first|mean, convolutions=yes|no"
RESIDUAL = (
    "residual takes k=3 or groups such as 3+3+2, r=16, stack=NAME, diagonal=yes|no, bias=shared|own, init=fit|zero, "
    "lowering=auto|factored|merged, convolutions=yes|no"
)

sizes = st.integers(1, 40)
names = st.none() | st.from_regex(r"[a-zA-Z0-9_.{}·=+*@-]+", fullmatch=True)
groups = st.one_of(
    st.builds(Open, sizes),
    st.builds(Uniform, sizes, sizes),
    st.builds(Sizes, st.lists(st.builds(Run, sizes, st.integers(1, 4)), min_size=2, max_size=8).map(tuple)),
    st.just(Leaders((0, 1, 0, 1))),
)
biases = st.sampled_from(["shared", "own"])
shares = st.builds(Share, groups, names, biases, st.sampled_from(["first", "mean"]), st.booleans())
fits, lowerings = st.sampled_from(["fit", "zero"]), st.sampled_from(["auto", "factored", "merged"])
residuals = st.one_of(
    st.builds(Residual, sizes, groups, names, st.booleans(), biases, fits, lowerings, st.booleans()),
    st.builds(
        Residual, sizes, st.none(), names, st.booleans(), init=fits, lowering=lowerings, convolutions=st.booleans()
    ),
)
plans = st.lists(st.one_of(shares, residuals, st.just(Reuse(Open(2)))), min_size=1, max_size=4)


@given(plans.map(lambda passes: Plan(tuple(passes))))
def test_a_plan_is_what_its_text_says(plan: Plan) -> None:
    again = Plan.parse(str(plan))
    assert again == plan
    assert str(again) == str(plan)


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("share k=3", Share(Open(3))),
        ("share bias=own 3+3+2", Share(Sizes((Run(3), Run(3), Run(2))), bias="own")),
        ("residual r=16 k=3", Residual(16, Open(3))),
        ("residual k=3 r=2 diagonal=no init=zero", Residual(2, Open(3), diagonal=False, init="zero")),
        ("share k=2 convolutions=yes", Share(Open(2), convolutions=True)),
        ("residual convolutions=yes k=2 r=3", Residual(3, Open(2), convolutions=True)),
        ("residual r=8 stack=encoder lowering=merged", Residual(8, stack="encoder", lowering="merged")),
    ],
)
def test_forms(text, step):
    assert Plan.parse(text) == Plan((step,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("share", f"plan 'share', 'share' at character 1: groups are missing after it; {SHARE}"),
        ("residual k=3", f"plan 'residual k=3', 'residual' at character 1: r= is missing after it; {RESIDUAL}"),
        (
            "share k=0",
            "plan 'share k=0', 'k=0' at character 7: k= is the number of layers that share a weight, 1 or more, "
            "found 0",
        ),
        (
            "residual k=2 r=-1",
            "plan 'residual k=2 r=-1', 'r=-1' at character 14: r= is the rank of a residual, 1 or more, found -1",
        ),
        (
            "4x4 | share k=2 r=3",
            f"plan '4x4 | share k=2 r=3', 'r=3' at character 17: unknown option; {SHARE}",
        ),
        (
            "residual k=2 r=3 lowring=merged",
            "plan 'residual k=2 r=3 lowring=merged', 'lowring=merged' at character 18: unknown option "
            f"(did you mean lowering?); {RESIDUAL}",
        ),
        (
            "share k=2 convolutions=true",
            "plan 'share k=2 convolutions=true', 'convolutions=true' at character 11: convolutions= takes one of yes, "
            "no, found 'true'",
        ),
        ("share k=2 k=3", "plan 'share k=2 k=3', 'k=3' at character 11: a pass has groups once"),
        ("residual r=2 r=3", "plan 'residual r=2 r=3', 'r=3' at character 14: r= is given twice"),
        (
            "residual r=2 lowering=fused",
            "plan 'residual r=2 lowering=fused', 'lowering=fused' at character 14: lowering= takes one of auto, "
            "factored, merged, found 'fused'",
        ),
        (
            "share 2(H4)x2",
            "plan 'share 2(H4)x2', '2(H4)x2' at character 7: heads (H4) belong to a reuse pass; groups of shared "
            "weights are such as k=3 or 3+3+2",
        ),
        (
            "residual r=2 bias=own",
            "plan 'residual r=2 bias=own', 'residual' at character 1: bias= is said where weights are shared; give "
            "groups such as k=3, or leave bias= out",
        ),
        ("share k=2 share", "plan 'share k=2 share', 'share' at character 11: passes are separated by '|'"),
        ("shared k=3", "plan 'shared k=3', 'shared' at character 1: unknown pass (did you mean share?)"),
        (
            "reuse share",
            "plan 'reuse share', 'share' at character 7: the pass is named twice; passes are separated by '|'",
        ),
    ],
)
def test_what_cannot_be_read(text, message):
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert str(caught.value) == message


def test_values_are_checked_without_text_too():
    with pytest.raises(PlanError, match="r= is the rank of a residual, 1 or more, found 0"):
        Residual(0)
    with pytest.raises(PlanError, match="share takes groups"):
        Share(3)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="heads"):
        Residual(2, Open(2, heads=4))


def test_choice_of_a_stack():
    stacks = {"encoder.{i}·self": 12, "decoder.{i}·self": 6}
    assert choose_stack(Share(Open(4), "encoder"), stacks) == ("encoder.{i}·self", (0,) * 4 + (4,) * 4 + (8,) * 4)
    assert choose_stack(Residual(2, Uniform(3, 2)), stacks)[0] == "decoder.{i}·self"
    assert choose_named_stack(Residual(2, stack="dec"), stacks) == "decoder.{i}·self"
    with pytest.raises(PlanError, match=r"has 2 stacks; say which, as in 'residual r=2 stack=encoder\.{i}·self'"):
        choose_named_stack(Residual(2), stacks)
    with pytest.raises(PlanError, match="no stack of attentions"):
        choose_named_stack(Residual(2), {})


def test_groups_that_do_not_fit_are_answered_with_plans_of_the_same_kind():
    stacks = {"layers.{i}·self": 6}
    for plan, offered in (
        ("share 2+3 bias=own", [f"share {groups} bias=own" for groups in ("k=2", "k=3", "k=6", "2+4")]),
        ("residual 4x2 r=4", [f"residual {groups} r=4" for groups in ("k=2", "k=3", "k=6", "2+4")]),
        ("2+3", ["2x3", "3x2", "6x1", "2x*"]),
    ):
        with pytest.raises(PlanError) as caught:
            choose_stack(Plan.parse(plan).passes[0], stacks)
        assert str(caught.value).endswith(f"plans for 6 layers: {', '.join(offered)}")
        for fits in offered:
            choose_stack(Plan.parse(fits).passes[0], stacks)
    with pytest.raises(PlanError, match=r"decoder: 3 layers, takes share k=3, share 2\+1"):
        choose_stack(Plan.parse("share 2+4").passes[0], {"encoder": 4, "decoder": 3})
