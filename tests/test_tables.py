"""Lengths that a table of positions does not reach are refused; what is legal is not."""

import pytest
import torch
from torch import nn

import fxreuse
from fxreuse.cost_model.summary import summarise
from fxreuse.frontend.load import load_program

ROWS = 16


class Embedded(nn.Module):
    """A layer over the sum of an input and rows of a table."""

    def __init__(self, places):
        super().__init__()
        self.places, self.table = places, nn.Embedding(ROWS, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.layers(x + self.table(self.places(x)))


def positions(x):
    return torch.arange(x.shape[1], device=x.device)


def summary_of(places):
    return summarise(load_program(Embedded(places).eval(), torch.randn(2, 5, 8)))


@pytest.mark.parametrize(
    ("places", "longest"),
    [
        (positions, ROWS),
        (lambda x: positions(x) + 2, ROWS - 2),
        (lambda x: positions(x).flip(0), ROWS),
        (lambda x: torch.ones(x.shape[:2], dtype=torch.long).cumsum(1) + 1, ROWS - 2),
        (lambda x: (2 * positions(x)).unsqueeze(0), ROWS // 2),
    ],
    ids=["from 0", "from 2", "backwards", "running sum", "every other"],
)
def test_a_table_bounds_the_length(places, longest):
    summary = summary_of(places)
    assert summary.at(B=3, T=longest).macs > 0
    with pytest.raises(fxreuse.errors.InputError) as raised:
        summary.at(B=3, T=longest + 1)
    read = {16: 16, 14: 16, 8: 16}[longest]
    expected = f"table has {ROWS} rows, 0 to {ROWS - 1}; found x of 3×{longest + 1}×8, which would read row {read}."
    assert expected in str(raised.value)
    with pytest.raises(IndexError):
        Embedded(places)(torch.randn(3, longest + 1, 8))


@pytest.mark.parametrize(
    "places",
    [
        lambda x: positions(x).clamp(max=ROWS - 1),
        lambda x: torch.minimum(positions(x), torch.tensor(ROWS - 1)),
        lambda x: positions(x) % ROWS,
        lambda x: torch.where(positions(x) < ROWS, positions(x), ROWS - 1),
        lambda x: (x[..., 0] > 0).long().cumsum(1).clamp(max=ROWS - 1),
        lambda x: torch.zeros(x.shape[:2], dtype=torch.long),
    ],
    ids=["clamped", "minimum", "modulo", "where", "data", "constant"],
)
def test_what_a_table_can_serve_is_not_refused(places):
    summary = summary_of(places)
    Embedded(places)(torch.randn(1, 4 * ROWS, 8))
    assert summary.at(B=1, T=4 * ROWS).macs > 0


def test_a_report_shows_lengths_that_the_table_reaches_and_refuses_others():
    model, x = Embedded(positions), torch.randn(2, 5, 8)
    found = fxreuse.report(model, "2x1", x)
    assert [sizes["T"] for sizes in found.at] == [5]
    for summary in (found.before, found.after):
        assert summary.at(B=1, T=ROWS).macs > 0
        with pytest.raises(fxreuse.errors.InputError, match="which would read row 16"):
            summary.at(B=1, T=ROWS + 1)
    with pytest.raises(fxreuse.errors.InputError, match="Ask for a length that is shorter by 16 rows"):
        fxreuse.report(model, "2x1", x, sizes={"T": 2 * ROWS})
