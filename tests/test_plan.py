"""Plans: reading, writing, laying over stacks; messages word by word."""

from __future__ import annotations

import doctest
import functools
import itertools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxreuse
from fxreuse.errors import PlanError
from fxreuse.plans.groups import Groups, Leaders, Open, Pattern, Run, Sizes, Uniform, fitting
from fxreuse.plans.groups_text import parse_groups
from fxreuse.plans.plan import Plan, Reuse
from fxreuse.plans.plan_options import DTYPES, Match
from fxreuse.plans.stack_choice import choose_stack

from .running import apply_module

FORMS = (
    "4x4 or 4by4 (4 layers a group, 4 groups), 2x* (to the end of the stack), 4+4+8 (sizes of groups), "
    "4(H8)x2+4(H4)x2 (8 heads, then 4), FSSSFSSS (F computes, S shares), leaders=0,0,2,2 (leader of every layer)"
)
OPTIONS = "stack=NAME, values=2, ffn=864|match|match:PLAN, lowering=auto|materialize|recompute, dtype=fp32|bf16|fp16"
BART = {
    "encoder.layers.{i}.self_attn·self": 12,
    "decoder.layers.{i}.self_attn·self": 6,
    "decoder.layers.{i}.encoder_attn·cross": 6,
}

sizes = st.integers(1, 40)
letters = st.text("FS", max_size=20).map(lambda rest: "F" + rest)
names = st.from_regex(r"[a-zA-Z0-9_.{}·=+*@-]+", fullmatch=True)


@st.composite
def leaders(draw: st.DrawFn) -> Leaders:
    chosen: list[int] = []
    for layer in range(draw(st.integers(1, 12))):
        chosen.append(draw(st.sampled_from([*sorted(set(chosen)), layer])))
    return Leaders(tuple(chosen))


heads = st.none() | st.integers(1, 16)
groups = st.one_of(
    st.builds(Uniform, sizes, sizes, st.sampled_from(["x", "by"]), heads),
    st.builds(Open, sizes, heads),
    st.builds(Sizes, st.lists(st.builds(Run, sizes, st.integers(1, 4), heads), min_size=2, max_size=8).map(tuple)),
    st.builds(Pattern, letters),
    leaders(),
)


@st.composite
def reuses(draw: st.DrawFn) -> Reuse:
    lowering = draw(st.sampled_from(["auto", "materialize", "recompute"]))
    return Reuse(
        draw(groups),
        stack=draw(st.none() | names),
        values=draw(st.integers(1, 4)),
        ffn=draw(st.none() | st.integers(1, 5000) | st.builds(Match, st.none() | groups)),
        lowering=lowering,
        dtype=None if lowering == "recompute" else draw(st.sampled_from([None, *DTYPES])),
    )


plans = st.lists(reuses(), min_size=1, max_size=4).map(lambda passes: Plan(tuple(passes)))


@given(plans)
def test_a_plan_is_what_its_text_says(plan: Plan) -> None:
    again = Plan.parse(str(plan))
    assert again == plan
    assert hash(again) == hash(plan)
    assert str(again) == str(plan)


@given(plans, st.data())
def test_white_space_and_the_word_reuse_do_not_matter(plan: Plan, data: st.DataObject) -> None:
    gaps = st.text(" \t\n", min_size=1, max_size=3)
    bars = st.sampled_from(["|", " | ", "\n| reuse "])
    words = [data.draw(gaps).join(str(step).split(" ")) for step in plan.passes]
    text = "".join(itertools.chain.from_iterable((data.draw(bars), word) for word in words)).lstrip(" \n|")
    assert Plan.parse(text) == plan


@given(groups, st.integers(1, 60))
def test_leaders_lead_themselves_and_come_first(form: Groups, layers: int) -> None:
    layers = form.layers or max(layers, 2)
    found = form.leaders(layers)
    assert len(found) == layers
    assert all(leader <= layer and found[leader] == leader for layer, leader in enumerate(found))
    assert Leaders(found).leaders(layers) == found


@given(groups, st.integers(1, 60))
def test_the_layers_of_a_group_have_as_many_heads(form: Groups, layers: int) -> None:
    layers = form.layers or max(layers, 2)
    counts, found = form.head_counts(layers), form.leaders(layers)
    assert len(counts) == layers
    assert all(counts[layer] == counts[leader] for layer, leader in enumerate(found))


@given(groups, st.integers(0, 60))
def test_leaders_fit_or_are_refused_with_both_numbers(form: Groups, layers: int) -> None:
    if form.fits(layers):
        assert len(form.leaders(layers)) == layers
        return
    with pytest.raises(PlanError) as caught:
        form.leaders(layers)
    assert str(form) in str(caught.value)
    assert f"found {layers};" in str(caught.value)
    assert form.extent in str(caught.value)


@given(st.integers(1, 200))
def test_what_is_offered_fits(layers: int) -> None:
    offered = fitting(layers)
    assert offered
    assert all(parse_groups(text).fits(layers) for text in offered)


@given(st.text("4x*+FSby,=leaders |reuse0-(H):match", max_size=30))
def test_any_text_is_a_plan_or_a_plan_error(text: str) -> None:
    try:
        plan = Plan.parse(text)
    except PlanError:
        return
    assert Plan.parse(str(plan)) == plan


@pytest.mark.parametrize(
    ("text", "layers", "expected"),
    [
        ("2x3", 6, (0, 0, 2, 2, 4, 4)),
        ("2by3", 6, (0, 0, 2, 2, 4, 4)),
        ("1x3", 3, (0, 1, 2)),
        ("3x1", 3, (0, 0, 0)),
        ("2x*", 5, (0, 0, 2, 2, 4)),
        ("4x*", 3, (0, 0, 0)),
        ("1x*", 1, (0,)),
        ("1+3+2", 6, (0, 1, 1, 1, 4, 4)),
        ("2(H8)x2+2(H4)", 6, (0, 0, 2, 2, 4, 4)),
        ("2(H8)by2", 4, (0, 0, 2, 2)),
        ("FSSSFSSF", 8, (0, 0, 0, 0, 4, 4, 4, 7)),
        ("F", 1, (0,)),
        ("leaders=0,0,2,2", 4, (0, 0, 2, 2)),
        ("leaders=0,1,0,1", 4, (0, 1, 0, 1)),
    ],
)
def test_leaders(text: str, layers: int, expected: tuple[int, ...]) -> None:
    assert parse_groups(text).leaders(layers) == expected
    assert str(parse_groups(text)) == text


@pytest.mark.parametrize(
    ("text", "layers"), [("4x4", 16), ("2x*", None), ("4+4+8", 16), ("4(H8)x2+8", 16), ("FSS", 3), ("leaders=0,0", 2)]
)
def test_layers(text: str, layers: int | None) -> None:
    assert parse_groups(text).layers == layers


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("2x2", (None,) * 4),
        ("2(H8)x2", (8,) * 4),
        ("2(H8)by2", (8,) * 4),
        ("3(H2)x*", (2,) * 4),
        ("1(H2)x2+2(H4)", (2, 2, 4, 4)),
        ("1+1(H1)+2", (None, 1, None, None)),
        ("FSFS", (None,) * 4),
        ("leaders=0,0,2,2", (None,) * 4),
    ],
)
def test_heads(text: str, counts: tuple[int | None, ...]) -> None:
    assert parse_groups(text).head_counts(4) == counts
    assert str(parse_groups(text)) == text


# Table 2 of the ICLR paper, row by row, as it is written there.
TABLE_2 = [
    ("1(H4)x16", [4] * 16, 16),
    ("2(H4)x8", [4] * 16, 8),
    ("4(H8)+4(H8)+4(H8)+4(H8)", [8] * 16, 4),
    ("4(H2)+4(H2)+4(H4)+4(H4)", [2] * 8 + [4] * 8, 4),
    ("4(H4)+4(H4)+4(H4)+4(H4)", [4] * 16, 4),
    ("4(H8)+4(H8)+4(H4)+4(H4)", [8] * 8 + [4] * 8, 4),
    ("4(H4)+4(H4)+4(H2)+4(H2)", [4] * 8 + [2] * 8, 4),
    ("4(H4)+4(H4)+4(H8)+4(H8)", [4] * 8 + [8] * 8, 4),
    ("4(H4)+4(H4)+8(H4)", [4] * 16, 3),
    ("8(H4)+4(H4)+4(H4)", [4] * 16, 3),
    ("8(H4)+8(H4)", [4] * 16, 2),
    ("8(H8)+8(H8)", [8] * 16, 2),
]


@pytest.mark.parametrize(("text", "counts", "leading"), TABLE_2)
def test_every_row_of_the_paper_can_be_written(text: str, counts: list[int], leading: int) -> None:
    groups = parse_groups(text)
    assert str(groups) == text
    assert list(groups.head_counts(16)) == counts
    assert len(set(groups.leaders(16))) == leading


def test_equality_is_by_value() -> None:
    assert Plan.parse("2by6") == Plan.parse("2x6")
    assert str(Plan.parse("2by6")) == "2by6"
    assert len({Plan.parse("2by6"), Plan.parse("reuse 2x6 lowering=auto")}) == 1
    assert Plan.parse("2x6") != Plan.parse("6x2")
    assert Plan.parse("4x4 | 2x*") == Plan((Reuse(Uniform(4, 4)), Reuse(Open(2))))
    assert Plan.parse("4x4 ffn=match:2by8 values=1") == Plan.parse("4x4 ffn=match:2x8")
    assert Plan.parse("4(H8)x4") != Plan.parse("4x4")
    assert Plan.parse("4x4|2x*") == Plan.parse(" 4x4 |  reuse 2x* ")


def test_of_takes_plans_and_text() -> None:
    plan = Plan.parse("4x4")
    assert Plan.of(plan) is plan
    assert Plan.of("4x4") == plan
    with pytest.raises(PlanError, match=r"^a plan is a string such as '4x4' or a fxreuse\.Plan, found list$"):
        Plan.of(["4x4"])  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, 4, b"4x4", ["4x4"]], ids=repr)
def test_a_plan_is_read_from_text(value: object) -> None:
    kind = type(value).__name__
    with pytest.raises(PlanError, match=rf"^a plan is read from a string such as '4x4', found {kind}; write groups"):
        Plan.parse(value)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=f"found {kind}$"):
        fxreuse.apply(torch.nn.Linear(2, 2), value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            f"plan '' is empty; write groups, such as {FORMS}, then options: {OPTIONS}",
        ),
        ("4x4 |", "plan '4x4 |', '|' at character 5: a pass is missing after it"),
        ("| 4x4", "plan '| 4x4', '|' at character 1: a pass is missing before it"),
        ("4x4 || 2x*", "plan '4x4 || 2x*', '|' at character 6: a pass is missing before it"),
        ("0x3", "plan '0x3', '0x3' at character 1: a group has at least 1 layer, found 0"),
        ("-2x3", "plan '-2x3', '-2x3' at character 1: a group has at least 1 layer, found -2"),
        ("4x0", "plan '4x0', '4x0' at character 1: there is at least 1 group, found 0"),
        ("0x*", "plan '0x*', '0x*' at character 1: a group has at least 1 layer, found 0"),
        ("4+0", "plan '4+0', '4+0' at character 1: a group has at least 1 layer, found 0"),
        (
            "2x* | SFS",
            "plan '2x* | SFS', 'SFS' at character 7: "
            "the first layer has no map before it to share, so the first letter is F, found S",
        ),
        (
            "leaders=0,0,3",
            "plan 'leaders=0,0,3', 'leaders=0,0,3' at character 1: "
            "the leader of layer 2 is one of the layers 0 to 2, found 3",
        ),
        (
            "leaders=0,-1",
            "plan 'leaders=0,-1', 'leaders=0,-1' at character 1: "
            "the leader of layer 1 is one of the layers 0 to 1, found -1",
        ),
        (
            "leaders=0,0,1",
            "plan 'leaders=0,0,1', 'leaders=0,0,1' at character 1: "
            "a leader leads itself, but layer 2 has the leader 1, and layer 1 has the leader 0",
        ),
        (
            "leaders=0, 0",
            "plan 'leaders=0, 0', 'leaders=0,' at character 1: "
            "leaders= takes indices and commas, no spaces, as in leaders=0,0,2,2, found '0,'",
        ),
        ("4x4 k=3", f"plan '4x4 k=3', 'k=3' at character 5: unknown option; options are {OPTIONS}"),
        (
            "4x4 value=2",
            "plan '4x4 value=2', 'value=2' at character 5: "
            f"unknown option (did you mean values?); options are {OPTIONS}",
        ),
        (
            "4x4 stak=encoder",
            "plan '4x4 stak=encoder', 'stak=encoder' at character 5: "
            f"unknown option (did you mean stack?); options are {OPTIONS}",
        ),
        (
            "4x4 lowering=recomput",
            "plan '4x4 lowering=recomput', 'lowering=recomput' at character 5: lowering= takes one of "
            "auto, materialize, recompute, found 'recomput' (did you mean recompute?)",
        ),
        (
            "4x4 stack=",
            "plan '4x4 stack=', 'stack=' at character 5: stack= takes the name of a stack, "
            "without spaces and '|', found ''",
        ),
        ("4x4 stack=a stack=b", "plan '4x4 stack=a stack=b', 'stack=b' at character 13: stack= is given twice"),
        (
            "4x4 recompute",
            "plan '4x4 recompute', 'recompute' at character 5: "
            "an option is written name=value (did you mean lowering=recompute?)",
        ),
        (
            "4x4 values=0",
            "plan '4x4 values=0', 'values=0' at character 5: "
            "values= is how many times as wide the values of followers become, 1 or more, found 0",
        ),
        (
            "4x4 values=1.5",
            "plan '4x4 values=1.5', 'values=1.5' at character 5: values= takes a whole number, found '1.5'",
        ),
        (
            "4x4 ffn=-8",
            "plan '4x4 ffn=-8', 'ffn=-8' at character 5: ffn= is the width of the feed-forward layers, "
            "1 or more, found -8",
        ),
        (
            "2x* | 4x4 ffn=mach:2x8",
            "plan '2x* | 4x4 ffn=mach:2x8', 'ffn=mach:2x8' at character 11: ffn= takes a width, match or match:PLAN, "
            "as in ffn=match:2x6, found 'mach:2x8' (did you mean match?)",
        ),
        (
            "4x4 ffn=match:0x8",
            "plan '4x4 ffn=match:0x8', 'ffn=match:0x8' at character 5: a group has at least 1 layer, found 0",
        ),
        (
            "4x4 ffn=match:",
            "plan '4x4 ffn=match:', 'ffn=match:' at character 5: neither a pass nor groups; "
            f"passes are reuse, share and residual, groups are such as {FORMS}",
        ),
        (
            "4x4 dtype=bfloat16",
            "plan '4x4 dtype=bfloat16', 'dtype=bfloat16' at character 5: dtype= takes one of fp32, bf16, fp16, "
            "found 'bfloat16' (did you mean bf16?)",
        ),
        (
            "4x4 dtype=bf16 lowering=recompute",
            "plan '4x4 dtype=bf16 lowering=recompute', 'lowering=recompute' at character 16: dtype= is that of a "
            "stored map, and lowering=recompute stores none; leave one of the two out",
        ),
        ("4(H0)x4", "plan '4(H0)x4', '4(H0)x4' at character 1: a layer has at least 1 head, found 0"),
        ("4(H8)x0+4", "plan '4(H8)x0+4', '4(H8)x0+4' at character 1: there is at least 1 group, found 0"),
        (
            "4(H8) + 4(H4)",
            "plan '4(H8) + 4(H4)', '+' at character 7: groups are written without spaces, as in 4(H8)+4(H4)",
        ),
        (
            "4(H8)x2 + 4(H4)x2",
            "plan '4(H8)x2 + 4(H4)x2', '+' at character 9: groups are written without spaces, as in 4(H8)+4(H4)",
        ),
        ("4x4 2x*", "plan '4x4 2x*', '2x*' at character 5: a pass has groups once; passes are separated by '|'"),
        ("reuse", f"plan 'reuse', 'reuse' at character 1: groups are missing after it, such as {FORMS}"),
        (
            "reuse reuse 4x4",
            "plan 'reuse reuse 4x4', 'reuse' at character 7: the pass is named twice; passes are separated by '|'",
        ),
        (
            "reuse stack=encoder 4x4",
            "plan 'reuse stack=encoder 4x4', 'stack=encoder' at character 7: "
            "groups come before options, as in '4x4 stack=NAME'",
        ),
        ("resue 4x4", "plan 'resue 4x4', 'resue' at character 1: unknown pass (did you mean reuse?)"),
        (
            "prune",
            "plan 'prune', 'prune' at character 1: neither a pass nor groups; "
            f"passes are reuse, share and residual, groups are such as {FORMS}",
        ),
        (
            "4X4",
            "plan '4X4', '4X4' at character 1: neither a pass nor groups (did you mean 4x4?); "
            f"passes are reuse, share and residual, groups are such as {FORMS}",
        ),
    ],
)
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("4×4", "4x4"),
        ("4*4", "4x4"),
        ("4BY4", "4x4"),
        ("2by*", "2x*"),
        ("2xn", "2x*"),
        ("2x...", "2x*"),
        ("4-4-8", "4+4+8"),
        ("4,4,8", "4+4+8"),
        ("0,0,2,2", "leaders=0,0,2,2"),
        ("leader=0,0", "leaders=0,0"),
        ("fssf", "FSSF"),
        ("4", "4x*"),
        ("4(H8)", "4(H8)x*"),
        ("4(h8)x4", "4(H8)x4"),
        ("4H8x4", "4(H8)x4"),
        ("4[8]x4", "4(H8)x4"),
        ("4(8)+4(4)", "4(H8)+4(H4)"),
        ("4x", "4x*"),
    ],
)
def test_near_misses_are_named(text: str, meant: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_groups(text)
    assert f"(did you mean {meant}?)" in str(caught.value)


def test_values_are_checked_without_text_too() -> None:
    with pytest.raises(PlanError, match="2 or more groups, as in 4"):
        Sizes((Run(4),))
    with pytest.raises(PlanError, match="at least 1 head, found -1"):
        Open(2, heads=-1)
    with pytest.raises(PlanError, match=r"values= is .*, 1 or more, found 1\.5"):
        Reuse(Open(2), values=1.5)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="letters F and S, found 'FX'"):
        Pattern("FX")
    with pytest.raises(PlanError, match="found none"):
        Leaders(())
    with pytest.raises(PlanError, match="'x' or 'by', found 'times'"):
        Uniform(2, 2, "times")
    with pytest.raises(PlanError, match=r"without spaces and '\|', found 'a b'"):
        Reuse(Open(2), stack="a b")
    with pytest.raises(PlanError, match="at least one pass, found none"):
        Plan(())


def test_leaders_of_another_number_of_layers() -> None:
    with pytest.raises(PlanError) as caught:
        Uniform(4, 4).leaders(12)
    assert str(caught.value) == "4x4 is for 16 layers, found 12; plans for 12 layers: 2x6, 3x4, 4x3, 2x*"
    with pytest.raises(PlanError) as caught:
        Open(2).leaders(1)
    assert str(caught.value) == "2x* is for 2 or more layers, found 1; plans for 1 layer: 1x*"


@pytest.mark.parametrize(
    ("text", "name", "layers"),
    [
        ("2x6", "encoder.layers.{i}.self_attn·self", 12),
        ("2x* stack=encoder.layers.{i}.self_attn·self", "encoder.layers.{i}.self_attn·self", 12),
        ("2x* stack=encoder", "encoder.layers.{i}.self_attn·self", 12),
        ("2x* stack=decoder.layers.{i}.self", "decoder.layers.{i}.self_attn·self", 6),
        ("2x* stack=cross", "decoder.layers.{i}.encoder_attn·cross", 6),
        ("2x* stack=er_att", "decoder.layers.{i}.encoder_attn·cross", 6),
    ],
)
def test_choice_of_a_stack(text: str, name: str, layers: int) -> None:
    stack, found = choose_stack(Plan.parse(text).passes[0], BART)
    assert (stack, len(found)) == (name, layers)


def test_a_whole_component_goes_before_a_piece_of_one() -> None:
    stacks = {f"model.{name}": layers for name, layers in BART.items()}
    assert choose_stack(Reuse(Open(2), "encoder"), stacks)[0] == "model.encoder.layers.{i}.self_attn·self"


def test_an_exact_name_goes_before_a_longer_one() -> None:
    assert choose_stack(Reuse(Open(2), "layers"), {"layers.{i}": 3, "layers": 2}) == ("layers", (0, 0))


def test_stacks_too_short_to_share_do_not_make_an_open_plan_ambiguous() -> None:
    assert choose_stack(Reuse(Open(2)), {"encoder.{i}·self": 3, "pool·cross": 1}) == ("encoder.{i}·self", (0, 0, 2))


@pytest.mark.parametrize(
    ("text", "stacks", "message"),
    [
        (
            "4x4",
            {"layers.{i}·self": 12},
            "plan '4x4' is for 16 layers, found 12 layers in stack layers.{i}·self; "
            "plans for 12 layers: 2x6, 3x4, 4x3, 2x*",
        ),
        (
            "4x4",
            BART,
            "plan '4x4' is for 16 layers; no stack has as many; the stacks are\n"
            "  encoder.layers.{i}.self_attn·self: 12 layers, takes 2x6, 3x4, 4x3, 2x*\n"
            "  decoder.layers.{i}.self_attn·self: 6 layers, takes 2x3, 3x2, 6x1, 2x*\n"
            "  decoder.layers.{i}.encoder_attn·cross: 6 layers, takes 2x3, 3x2, 6x1, 2x*",
        ),
        (
            "2x3 lowering=recompute",
            BART,
            "plan '2x3 lowering=recompute' fits 2 stacks; say which, as in "
            "'2x3 stack=decoder.layers.{i}.self_attn·self lowering=recompute'; they are\n"
            "  decoder.layers.{i}.self_attn·self: 6 layers, takes 2x3, 3x2, 6x1, 2x*\n"
            "  decoder.layers.{i}.encoder_attn·cross: 6 layers, takes 2x3, 3x2, 6x1, 2x*",
        ),
        (
            "2x* stack=decoder",
            BART,
            "plan '2x* stack=decoder': stack=decoder may mean any of these stacks; give more of the name, as in "
            "'2x* stack=decoder.layers.{i}.self_attn·self'\n"
            "  decoder.layers.{i}.self_attn·self: 6 layers, takes 2x3, 3x2, 6x1, 2x*\n"
            "  decoder.layers.{i}.encoder_attn·cross: 6 layers, takes 2x3, 3x2, 6x1, 2x*",
        ),
        (
            "2x* stack=encodr",
            {"encoder.{i}·self": 2, "decoder.{i}·self": 4},
            "plan '2x* stack=encodr': no stack is called encodr (did you mean encoder?); the stacks are\n"
            "  encoder.{i}·self: 2 layers, takes 2x1, 2x*\n"
            "  decoder.{i}·self: 4 layers, takes 2x2, 4x1, 2x*",
        ),
        (
            "2x2 stack=encoder",
            BART,
            "plan '2x2 stack=encoder' is for 4 layers, found 12 layers in stack encoder.layers.{i}.self_attn·self; "
            "plans for 12 layers: 2x6, 3x4, 4x3, 2x*",
        ),
        (
            "2x* ffn=match:2x5",
            {"layers.{i}·self": 12},
            "plan '2x* ffn=match:2x5': ffn=match:2x5 is for 10 layers, found 12 layers in stack layers.{i}·self; "
            "plans for 12 layers: 2x6, 3x4, 4x3, 2x*",
        ),
        ("2x*", {}, "plan '2x*': the model has no stack of attentions to lay it over"),
    ],
)
def test_no_stack_or_several(text: str, stacks: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        choose_stack(Plan.parse(text).passes[0], stacks)
    assert str(caught.value) == message


DOCUMENT = Path(__file__).parents[1] / "docs" / "plans.md"


def test_examples_of_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its one model is captured once, and not for every plan."""
    monkeypatch.setattr(apply_module, "load_program", functools.cache(apply_module.load_program))
    failed, attempted = doctest.testfile(str(DOCUMENT), module_relative=False, encoding="utf-8")
    assert attempted > 5
    assert failed == 0


def test_plans_of_the_document() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    papers = re.findall(r"^\| `([^`]+)` \| `", text.partition("## The papers' plans")[2], re.M)
    assert len(papers) == 6
    for written in papers:
        assert str(Plan.parse(written)) == written
