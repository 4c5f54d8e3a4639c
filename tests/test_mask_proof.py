"""A mask that is said to be trivial is trivial at every size; the masks that models really write are seen through."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxreuse.frontend.capture import capture
from fxreuse.masks.index_forms import Truth
from fxreuse.masks.mask_proof import MaskProver, formula_of, prove

from .mask_expressions import FINISH, LOWEST, Expression, Masks, mask, masks, outputs, sizes_to_try

Q, K = ("position", 0, "plain"), ("position", 1, "plain")
CAUSAL = ("compare", "le", K, Q)

CAUSAL_WAYS: list[Expression] = [
    CAUSAL,
    ("compare", "lt", K, ("plus", Q, 1)),
    ("compare number", "ge", ("minus", Q, K), 0),
    ("compare number", "gt", ("times", ("minus", Q, K), 2), -1),
    ("not", ("compare", "gt", K, Q)),
    ("triangle", "tril", 0),
    ("not", ("triangle", "triu", 1)),
    ("join", "and", CAUSAL, ("compare number", "ge", Q, 0)),
    ("join", "or", CAUSAL, ("join", "and", CAUSAL, ("compare number", "lt", K, 4096))),
    ("where", CAUSAL, ("constant", True), ("constant", False)),
    ("as integers", CAUSAL, 0),
]
NO_MASKS: list[Expression] = [
    ("constant", True),
    ("compare number", "ge", Q, 0),
    ("compare number", "ge", ("abs", ("minus", Q, K)), 0),
    ("compare", "lt", K, ("plus size", ("times", Q, 0), 1, 1)),
    ("join", "or", CAUSAL, ("compare", "gt", K, Q)),
    ("compare", "eq", ("position", 0, "slope"), ("position", 1, "slope")),
]
NOT_TRIVIAL: list[Expression] = [
    ("compare", "lt", K, Q),
    ("compare", "le", K, ("plus", Q, 1)),
    ("compare", "le", K, ("plus", Q, -1)),
    ("compare", "ge", K, Q),
    ("compare", "eq", K, Q),
    ("compare", "le", Q, K),
    ("compare", "le", ("times", K, 2), Q),
    ("compare", "le", ("position", 1, "backwards"), Q),
    ("join", "or", CAUSAL, ("compare number", "lt", K, 8)),
    *(("window of", CAUSAL, window) for window in (3, 8, 128, 4096)),
    *(("window of", ("constant", True), window) for window in (3, 8, 128, 4096)),
    *(("triangle", which, diagonal) for which in ("tril", "triu") for diagonal in (-1, 1)),
    ("triangle", "triu", 0),
]
POSITIONS: list[tuple[str, Expression]] = [
    ("from one", Q),
    ("backwards", ("position", 0, "from the end")),
    ("even", ("times", Q, 2)),
    ("strided", ("plus", ("times", Q, 3), 1)),
    ("tail", ("plus", Q, 3)),
    ("tail from the end", ("plus", Q, 3)),
    ("gathered", ("plus", Q, 1)),
    ("gathered from the end", Q),
    ("counted", Q),
    ("slope", ("plus", ("times", Q, 0), 1)),
]


def comparison(name: str, plain: Expression) -> Expression:
    return ("compare", "eq", ("position", 0, name), plain)


def kinds(model: torch.nn.Module, *inputs: torch.Tensor, dynamic: bool = True) -> list[str]:
    nodes = outputs(model, *inputs, dynamic=dynamic)
    prover = MaskProver(nodes[0].graph)
    return [prover.prove(node).kind for node in nodes]


def kind(function: Callable[[torch.Tensor], torch.Tensor], *shape: int) -> str:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [function(x)]

    return kinds(Model(), torch.zeros(shape or (5,)))[0]


@functools.cache
def formula_kinds(square: bool) -> dict[Expression, str]:
    """What is said of every formula above, after one export of all of them."""
    formulas = [*CAUSAL_WAYS, *NO_MASKS, *NOT_TRIVIAL, *(comparison(*way) for way in POSITIONS)]
    masks = [("bool", formula) for formula in formulas]
    return dict(zip(formulas, kinds(Masks(masks, square), torch.zeros(5), torch.zeros(7)), strict=True))


def is_kind(values: torch.Tensor, claimed: str) -> bool:
    visible = values if values.dtype is torch.bool else values == 0
    hidden = ~visible if values.dtype is torch.bool else values <= LOWEST
    expected = torch.ones(visible.shape, dtype=torch.bool)
    expected = expected.tril() if claimed == "causal" else expected
    return bool((visible == expected).all() and (hidden == ~expected).all())


@given(st.lists(masks, min_size=2, max_size=2), st.booleans())
def test_what_is_proved_holds_at_every_size(expressions: list[Expression], square: bool) -> None:
    found = kinds(Masks(expressions, square), torch.zeros(5), torch.zeros(7))
    for expression, claimed in zip(expressions, found, strict=True):
        if claimed != "none-provable":
            for sizes in sizes_to_try([expression], square):
                assert is_kind(mask(expression, sizes), claimed), (expression, claimed, sizes)


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("formula", CAUSAL_WAYS)
def test_ways_to_write_a_causal_mask(formula: Expression, square: bool) -> None:
    assert formula_kinds(square)[formula] == "causal"


def test_ways_to_hand_over_a_causal_mask() -> None:
    found = kinds(Masks([(finish, CAUSAL) for finish in FINISH], True), torch.zeros(5), torch.zeros(7))
    assert dict(zip(FINISH, found, strict=True)) == dict.fromkeys(FINISH, "causal")


@pytest.mark.parametrize(("name", "plain"), POSITIONS)
def test_ways_to_write_positions(name: str, plain: Expression) -> None:
    assert formula_kinds(square=True)[comparison(name, plain)] == "all"


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("formula", NO_MASKS)
def test_ways_to_write_no_mask(formula: Expression, square: bool) -> None:
    assert formula_kinds(square)[formula] == "all"


@pytest.mark.parametrize("formula", NOT_TRIVIAL)
def test_what_only_looks_trivial_is_left_alone(formula: Expression) -> None:
    assert formula_kinds(square=True)[formula] == "none-provable"


@pytest.mark.parametrize(("size", "expected"), [(7, "causal"), (8, "causal"), (9, "none-provable")])
def test_a_window_is_seen_through_where_the_size_is_fixed(size: int, expected: str) -> None:
    model = Masks([("bool", ("window of", CAUSAL, 8))], square=True)
    assert kinds(model, torch.zeros(size), torch.zeros(3), dynamic=False) == [expected]


@pytest.mark.parametrize(("longest", "expected"), [(128, "causal"), (129, "none-provable")])
def test_a_window_is_seen_through_where_the_size_is_bounded(longest: int, expected: str) -> None:
    model = Masks([("bool", ("window of", CAUSAL, 128))], square=True)
    free = ({0: torch.export.Dim("size", max=longest)}, None)
    program = torch.export.export(model, (torch.zeros(5), torch.zeros(3)), dynamic_shapes=free)
    assert prove(program.graph.output_node().args[0][0]).kind == expected


def test_a_size_of_one_is_not_excluded() -> None:
    # Export takes free sizes to be at least 2; a program is run at 1 all the same.
    assert kind(lambda x: torch.arange(3)[None, :] < x.shape[0] + 1) == "none-provable"
    assert kind(lambda x: torch.arange(3)[None, :] < x.shape[0] + 3) == "all"


def test_packed_sequences_are_looked_for_in_plain_positions() -> None:
    def packed(x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])[None].expand(x.shape[0], -1)
        starts = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
        number = starts.cumsum(-1)
        rows, steps = torch.arange(x.shape[0])[:, None, None, None], torch.arange(x.shape[1])
        query, key = number[rows, steps[None, None, :, None]], number[rows, steps[None, None, None, :]]
        return (query == key).expand(-1, 1, -1, -1)

    assert kind(packed, 3, 5) == "all"


@pytest.mark.parametrize("first", [0, -2])
def test_positions_that_jump_are_not_one_sequence(first: int) -> None:
    def jump(x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[0])
        return (torch.diff(positions, prepend=torch.full((1,), first)) == 1)[None, :].expand(x.shape[0], -1)

    assert kind(jump) == "none-provable"


def lengths(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[0])[None, :] < x[:, None].long()


def any_of_both(x: torch.Tensor) -> torch.Tensor:
    return lengths(x) | (torch.arange(x.shape[0])[:, None] >= 0)


def both(x: torch.Tensor) -> torch.Tensor:
    return lengths(x) & (torch.arange(x.shape[0])[:, None] < 0)


def test_data_is_unknown_unless_it_does_not_matter() -> None:
    assert kind(lengths) == "none-provable"
    assert kind(any_of_both) == "all"
    assert kind(lambda x: torch.where(both(x), -torch.inf, 0.0)) == "all"


def test_a_buffer_is_data() -> None:
    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(9, 9, dtype=torch.bool).tril())

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.table[: x.shape[0], : x.shape[0]]]

    assert kinds(Table(), torch.zeros(5)) == ["none-provable"]


def test_a_mask_that_is_written_to_is_unknown() -> None:
    def written(x: torch.Tensor) -> torch.Tensor:
        visible = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool)
        visible[1:].masked_fill_(x[1:, None] > 0, False)
        return visible

    assert kind(written) == "none-provable"


@pytest.mark.parametrize("low", [-100.0, -1e4, -1e9, torch.nan, torch.inf], ids=["-100", "-1e4", "-1e9", "nan", "+inf"])
def test_a_mask_to_add_hides_only_if_nothing_is_lower(low: float) -> None:
    def added(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(x.shape[0], x.shape[0]).masked_fill(torch.ones(x.shape[0], x.shape[0]).triu(1).bool(), low)

    assert kind(added) == "none-provable"


def test_integers_that_would_wrap_are_given_up() -> None:
    assert kind(lambda x: torch.arange(x.shape[0])[None, :] * 2**40 * 2**30 >= 0) == "none-provable"
    assert kind(lambda x: torch.arange(x.shape[0])[None, :].to(torch.int8) >= 0) == "none-provable"


def test_the_formula_of_a_mask() -> None:
    model = Masks([("heads", ("window of", CAUSAL, 3)), ("where", ("constant", True))], square=True)
    window, nothing = outputs(model, torch.zeros(5), torch.zeros(7))
    assert str(formula_of(window)) == "i3 - i2 <= 0 and i2 - i3 - 2 <= 0"
    assert formula_of(nothing) == Truth(True)
    assert "i3 - i2 <= 0 and i2 - i3 - 2 <= 0" in prove(window).reason


def test_the_reason_names_the_data() -> None:
    class Padded(torch.nn.Module):
        def forward(self, padding: torch.Tensor) -> list[torch.Tensor]:
            return [padding[None, :] & (torch.arange(padding.shape[0])[:, None] >= 0)]

    (node,) = outputs(Padded(), torch.ones(5, dtype=torch.bool))
    assert prove(node).reason == "not shown for all sizes: unknown (the input padding) and -i0 <= 0"


def test_a_constant_is_true_or_false_everywhere() -> None:
    class Constants(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            i = torch.arange(x.shape[0])
            return [i >= 0, i < 0, i > 1, i]

    nodes = outputs(Constants(), torch.zeros(5))
    prover = MaskProver(nodes[0].graph)
    assert [prover.constant(node) for node in nodes] == [True, False, None, None]


class Tables(torch.nn.Module):
    """Masks made of what was stored when the model was built."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        ones = torch.ones(9, 9)
        tables = {
            "bools": ones.tril().bool(),
            "numbers": ones.tril().view(1, 1, 9, 9),
            "future": torch.full((9, 9), -torch.inf).triu(1),
            "positions": torch.arange(9).view(1, 9),
            "window": ones.tril().triu(-3).bool(),
            "odd": ones.tril().bool() & (torch.arange(81).view(9, 9) != 80),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=persistent)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        size = x.shape[0]
        place = self.positions[:, :size]
        return [
            self.bools[:size, :size],
            self.numbers[:, :, :size, :size] != 0,
            self.numbers[..., :size, :size].log(),
            self.future[:size, :size],
            place[:, None, :] <= place[:, :, None],
            self.window[:size, :size],
            self.odd[:size, :size],
        ]


def program_kinds(model: torch.nn.Module) -> list[str]:
    program = capture(model, torch.zeros(5))
    (outputs,) = program.graph.output_node().args
    prover = MaskProver(program.graph)
    return [prover.prove(node).kind for node in outputs]


def test_a_table_that_no_checkpoint_replaces_is_read() -> None:
    """The window is narrower than the table, and one element of the last one is not as in a triangle."""
    assert program_kinds(Tables(persistent=False)) == ["causal"] * 5 + ["none-provable"] * 2
    assert program_kinds(Tables(persistent=True)) == ["none-provable"] * 7


@pytest.mark.parametrize(
    "function",
    [
        lambda i: torch.less_equal(i[None, :], i[:, None]),
        lambda i: torch.greater(i[None, :], i[:, None]).logical_not(),
        lambda i: i.int()[None, :] <= i.int()[:, None],
        lambda i: i[None, :].int() - i[:, None] < 1,
        lambda i: torch.subtract(i[:, None], i) >= 0,
        lambda i: torch.where(i[None, :] > i[:, None], -torch.inf, 0.0),
        lambda i: (i[None, :] <= i[:, None]).float().log(),
        lambda i: torch.full((len(i), len(i)), -torch.inf).triu(diagonal=1),
    ],
)
def test_more_ways_to_write_a_causal_mask(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert kind(lambda x: function(torch.arange(x.shape[0]))) == "causal"


def test_chunks_are_not_causal() -> None:
    def chunks(x: torch.Tensor) -> torch.Tensor:
        chunk = torch.arange(x.shape[0]) // 4
        return chunk[None, :] <= chunk[:, None]

    assert kind(chunks) == "none-provable"


def test_integers_of_32_bits_that_would_wrap_are_given_up() -> None:
    assert kind(lambda x: torch.arange(x.shape[0]).int()[None, :] * 300 >= 0) == "none-provable"
    assert kind(lambda x: torch.arange(x.shape[0]).int()[None, :] * 3 >= 0) == "all"
