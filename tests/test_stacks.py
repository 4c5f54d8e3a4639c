"""Stacks are read from paths alone, so they are tested on paths alone."""

from __future__ import annotations

import pytest

from fxreuse.finding.stacks import Place, assign_stacks


def place(path: str, kind: str = "self") -> Place:
    """An attention at the end of a path like ``encoder@1.layer.3``: a call may have its number at any component."""
    calls: list[str] = []
    plain = ""
    for component in path.split("."):
        name, _, count = component.partition("@")
        plain = f"{plain}.{name}" if plain else name
        calls.append(f"{plain}@{count}" if count else plain)
    return Place(tuple(calls), kind)


def stacks(*places: Place) -> list[tuple[str, int, str]]:
    return [(p.stack, p.layer, p.layer_path) for p in assign_stacks(places)]


def test_layers_of_one_encoder() -> None:
    assert stacks(*(place(f"encoder.layer.{i}.attention.self") for i in range(3))) == [
        ("encoder.layer.{i}·self", i, f"encoder.layer.{i}") for i in range(3)
    ]


def test_ten_layers_and_more_keep_the_order_of_execution() -> None:
    found = stacks(*(place(f"layers.{i}.attn") for i in range(12)))
    assert [layer for _, layer, _ in found] == list(range(12))
    assert found[10][2] == "layers.10"


def test_numbers_follow_execution_and_not_names() -> None:
    assert [p[1:] for p in stacks(place("layers.1.attn"), place("layers.0.attn"))] == [(0, "layers.1"), (1, "layers.0")]


def test_layers_without_attention_are_skipped() -> None:
    assert [p[1:] for p in stacks(place("layers.2.attn"), place("layers.5.attn"))] == [(0, "layers.2"), (1, "layers.5")]


def test_self_and_cross_attention_are_two_stacks() -> None:
    places = [
        place(f"decoder.layers.{i}.{name}", kind)
        for i in range(2)
        for name, kind in (("self_attn", "self"), ("encoder_attn", "cross"))
    ]
    assert [p[0] for p in stacks(*places)] == ["decoder.layers.{i}·self", "decoder.layers.{i}·cross"] * 2


def test_stages_are_stacks_of_their_own() -> None:
    paths = [f"encoder.layers.{s}.blocks.{b}.attention" for s, depth in ((0, 2), (1, 3)) for b in range(depth)]
    assert [p[:2] for p in stacks(*map(place, paths))] == [
        *(("encoder.layers.0.blocks.{i}·self", b) for b in range(2)),
        *(("encoder.layers.1.blocks.{i}·self", b) for b in range(3)),
    ]


def test_lists_in_a_list_of_which_only_the_outer_number_varies() -> None:
    """A list of modules is never called, so that all its numbers are in the path of the module that is."""
    places = [Place(("decoder", f"decoder.layers.{i}.1", f"decoder.layers.{i}.1.attend"), "self") for i in (0, 2, 4)]
    assert stacks(*places) == [
        ("decoder.layers.{i}.1·self", number, f"decoder.layers.{i}.1") for number, i in enumerate((0, 2, 4))
    ]


def test_lists_in_a_list_of_which_both_numbers_vary() -> None:
    places = [Place((f"stages.{s}.{b}", f"stages.{s}.{b}.attn"), "self") for s in range(2) for b in range(2)]
    assert [p[0] for p in stacks(*places)] == ["stages.0.{i}·self"] * 2 + ["stages.1.{i}·self"] * 2


def test_a_number_that_does_not_vary_is_no_layer() -> None:
    found = stacks(*(place(f"encoder.block.{i}.layer.0.SelfAttention") for i in range(2)))
    assert [p[0] for p in found] == ["encoder.block.{i}·self"] * 2
    assert found[1][2] == "encoder.block.1"


def test_sites_of_one_kind_in_one_layer_have_the_way_to_them_in_the_name() -> None:
    found = stacks(*(place(f"layers.{i}.attn{k}") for i in range(2) for k in (1, 2)))
    assert [p[:2] for p in found] == [
        ("layers.{i}.attn1·self", 0),
        ("layers.{i}.attn2·self", 0),
        ("layers.{i}.attn1·self", 1),
        ("layers.{i}.attn2·self", 1),
    ]


def test_several_softmaxes_of_one_module_call() -> None:
    found = stacks(*(place(f"layers.{i}.attn") for i in range(2) for _ in range(2)))
    assert [p[0] for p in found] == ["layers.{i}.attn·self", "layers.{i}.attn#1·self"] * 2


def test_one_module_called_several_times() -> None:
    calls = ["", "@1", "@2"]
    paths = [f"encoder.albert_layer_groups.0{c}.albert_layers.0{c}.attention{c}" for c in calls]
    assert stacks(*map(place, paths)) == [
        (
            "encoder.albert_layer_groups.0.albert_layers.0@{i}·self",
            i,
            f"encoder.albert_layer_groups.0.albert_layers.0{c}",
        )
        for i, c in enumerate(calls)
    ]


def test_one_unnumbered_module_called_several_times() -> None:
    assert stacks(*(place(f"block{c}.attn{c}") for c in ("", "@1"))) == [
        ("block@{i}·self", 0, "block"),
        ("block@{i}·self", 1, "block@1"),
    ]


def test_an_encoder_called_twice_is_two_stacks() -> None:
    paths = [f"encoder{c}.layer{c}.{i}{c}.attn{c}" for c in ("", "@1") for i in range(2)]
    names = ["encoder.layer.{i}·self"] * 2 + ["encoder.layer.{i}@1·self"] * 2
    assert [p[0] for p in stacks(*map(place, paths))] == names


@pytest.mark.parametrize(
    ("path", "stack", "layer"),
    [
        ("encoder.layers.0.attn", "encoder.layers.{i}·self", "encoder.layers.0"),
        ("pool.attention", "pool.attention·self", "pool.attention"),
    ],
)
def test_one_site_is_a_stack_of_one(path: str, stack: str, layer: str) -> None:
    assert stacks(place(path)) == [(stack, 0, layer)]


def test_attention_of_the_outermost_module() -> None:
    assert stacks(Place((), "self")) == [("(root)·self", 0, "")]


def test_a_loop_without_modules_is_one_stack() -> None:
    assert stacks(Place((), "self"), Place((), "self")) == [("(root)·self", 0, ""), ("(root)·self", 1, "")]
