"""What a report says: formulas, numbers at sizes, where savings come from, parts, text, data, picture, errors."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxreuse
from fxreuse.command.cli import main
from fxreuse.cost_model import Device
from fxreuse.cost_model.presets import SERVER_CPU
from fxreuse.errors import InputError
from fxreuse.reports import cost_tables
from fxreuse.reports.cost_report import CostReport

# The module: its name in the package is that of the function.
report_module = importlib.import_module("fxreuse.report")

LAYERS, D, F, HEADS = 4, 16, 32, 2


class Layer(torch.nn.Module):
    """Projections that a layer holds itself, a fused causal attention, and a feed-forward layer, pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(D), torch.nn.LayerNorm(D)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(D, D) for _ in range(4))
        self.mlp = torch.nn.Sequential(torch.nn.Linear(D, F), torch.nn.GELU(), torch.nn.Linear(F, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (part(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        context = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(context.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(torch.nn.Module):
    """A causal model without embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = torch.nn.Linear(D, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


SIZES = {"B": 1, "T": (8, 32)}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model().eval()


@pytest.fixture(scope="module")
def report(model) -> Callable[..., CostReport]:
    """`fxreuse.report` of the model, which is captured once: nothing changes what was captured."""
    program = report_module.load_program(model, torch.randn(2, 5, D))

    def made(plan: str | None = None, **options: Any) -> CostReport:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report_module, "load_program", lambda *_: program)
            return fxreuse.report(model, plan, torch.randn(2, 5, D), **options)

    return made


@pytest.fixture(scope="module")
def found(report) -> CostReport:
    return report("2x2 lowering=materialize", sizes=SIZES, device="A100")


class TestFormulas:
    def test_before_and_after(self, found):
        b, t = found.before.symbols["B"], found.before.symbols["T"]
        full, follower = 4 * D * D + 2 * D * F, 2 * D * D + 2 * D * F
        assert found.before.macs == (LAYERS * (b * t * full + 2 * b * t**2 * D) + 7 * D * b * t).expand()
        assert found.after.macs == (2 * b * t * (full + follower) + 6 * b * t**2 * D + 7 * D * b * t).expand()
        assert found.before.map_bytes == 4 * LAYERS * HEADS * b * t**2 == 2 * found.after.map_bytes
        assert found.before.macs_algorithmic == found.before.macs

    def test_weights(self, model, found):
        count = sum(parameter.numel() for parameter in model.parameters())
        assert found.before.params == count
        assert found.before.weights == {torch.float32: 4 * count}
        assert found.before.weight_bytes == 4 * count
        assert found.before.params - found.after.params == 2 * 2 * (D * D + D)

    def test_training_equals_torch(self, model, found):
        x = torch.randn(3, 10, D)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        model.zero_grad()
        assert found.before.at(B=3, T=10).macs_training == counter.get_total_flops() // 2

    def test_every_way_of_parting_them_adds_up(self, found):
        for summary in (found.before, found.after):
            counts = summary.counts
            for parted in (counts.macs_by_op, counts.macs_by_kind, counts.macs_by_module, counts.macs_by_layer):
                assert sum(parted.values()).expand() == summary.macs
        assert set(found.before.counts.macs_by_layer) == {"", *(f"layers.{i}" for i in range(LAYERS))}

    def test_bytes_of_one_layer(self, found):
        b, t = found.before.symbols["B"], found.before.symbols["T"]
        layer = [operation for operation in found.before.operations if operation.layer == "layers.1"]
        linear = sum(operation.bytes for operation in layer if operation.module == "layers.1.q")
        assert linear.expand() == 2 * 4 * D * b * t + 4 * (D * D + D)

    def test_on_the_meta_device(self, found):
        with torch.device("meta"):
            bare = Model().eval()
        x = torch.empty(1, 5, D)  # inputs may be anywhere
        bare = fxreuse.report(bare, "2x2 lowering=materialize", x, sizes=SIZES)
        assert (bare.before.macs, bare.after.macs) == (found.before.macs, found.after.macs)
        assert bare.rows[3].before == found.rows[3].before


class TestParts:
    def test_savings_add_up(self, found):
        assert sum(saving.params for saving in found.savings) == found.before.params - found.after.params
        macs = sum(saving.macs for saving in found.savings)
        assert sympy.expand(macs - found.before.macs + found.after.macs) == 0
        assert {saving.module: saving.count for saving in found.savings}["layers.{i}.q"] == 2

    def test_breakdown(self, found):
        parts = {when: {part.name: part for part in parts} for when, parts in found.breakdown().items()}
        norms, b, t = 2 * D, 1, 32
        attention = 4 * (D * D + D) + norms
        assert parts["before"]["attention"].params == LAYERS * attention
        assert parts["before"]["feed-forward"].params == LAYERS * (2 * D * F + D + F + norms)
        assert parts["before"]["rest"].params == 7 * D
        assert parts["before"]["attention"].macs == LAYERS * (4 * D * D * b * t + 2 * b * t * t * D)
        assert parts["before"]["reused attention"].macs == 0
        assert parts["after"]["attention"].params == 2 * attention
        assert parts["after"]["reused attention"].params == 2 * (attention - 2 * (D * D + D))
        assert parts["after"]["reused attention"].macs == 2 * (2 * D * D * b * t + b * t * t * D)
        for when, summary in (("before", found.before), ("after", found.after)):
            assert sum(part.params for part in parts[when].values()) == summary.params
            assert sum(part.macs for part in parts[when].values()) == summary.at(B=b, T=t).macs
            assert all((part.seconds > 0) == (part.macs > 0) for part in parts[when].values())

    def test_decoding(self, found):
        decoding = found.decoding
        past, new = sympy.symbols("S n", integer=True, positive=True)
        b = found.before.symbols["B"]
        full = LAYERS * (4 * D * D + 2 * D * F) + 7 * D
        assert decoding.macs_before == (b * new * full + 2 * LAYERS * D * b * new * (new + past)).expand()
        assert decoding.kv_bytes_per_token_before == 4 * LAYERS * 2 * D
        assert decoding.kv_bytes_per_token_after == 4 * (LAYERS + 2) * D

    def test_decoding_where_a_capture_divides_lengths(self):
        """BLOOM's keys have a length of T²//T in the graph."""
        config = transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2)
        found = fxreuse.report(transformers.BloomModel(config), None, torch.zeros(2, 7, dtype=torch.long))
        past, new = sympy.symbols("S n", integer=True, positive=True)
        b = found.before.symbols["B"]
        assert found.decoding.macs_before == (2 * (12 * 16**2 * b * new + 2 * 16 * b * new * (new + past))).expand()
        assert "//" not in str(found.before.macs + found.before.bytes_moved)

    def test_work_by_blocks_of_tokens_has_no_decode_step(self):
        class Blocks(Model):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(super().forward(x)[:, ::4, :1].expand(-1, -1, D))

        assert fxreuse.report(Blocks().eval(), None, torch.randn(2, 9, D)).decoding is None


class TestSizes:
    def test_columns(self, found):
        assert (found.running, found.columns(), found.fixed()) == ("T", [8, 32], {"B": 1})
        assert found.rows[0].name == "MACs"
        assert found.rows[0].before[1] == found.before.at(B=1, T=32).macs

    def test_peak_memory_is_that_of_the_models(self, found):
        small, large = (found.before.at(B=1, T=length).peak_bytes for length in (8, 32))
        assert 0 < small < large
        assert found.before.at(B=1, T=8).peak_bytes_training > small

    def test_the_usual_lengths(self, report):
        alone = report()
        assert alone.columns() == [128, 256, 512, 1024, 2048]
        assert alone.fixed() == {"B": 2}
        assert alone.after is alone.before
        assert "after" not in str(alone)

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"tokens": 8}, "no size 'tokens' here. The sizes are: B .*T"),
            ({"B": (1, 2), "T": (8, 16)}, "several for B and T"),
            ({"T": 2.5}, "T is 2.5"),
            ({"T": (8, -1)}, "T is -1"),
            ({"B": 0}, "B is 0, but has to be a whole number, 1 or more"),
        ],
    )
    def test_errors(self, report, sizes, message):
        with pytest.raises(InputError, match=message):
            report(sizes=sizes)

    def test_batches_that_have_to_be_equal_are_one(self):
        """`torch.nn.TransformerDecoder` fails on a memory of another batch."""
        layer = torch.nn.TransformerDecoderLayer(D, HEADS, F, batch_first=True)
        decoder = torch.nn.TransformerDecoder(layer, 2).eval()
        given = torch.randn(2, 7, D), torch.randn(2, 11, D)
        found = fxreuse.report(decoder, None, given, sizes={"B": 4, "T": (8, 16)}, device="A100")
        assert found.at == ({"B": 4, "T": 8, "memory_1": 8}, {"B": 4, "T": 16, "memory_1": 16})
        assert found.before.at(memory_0=3, T=5, memory_1=4) == found.before.at(B=3, T=5, memory_1=4)
        with pytest.raises(InputError, match="memory_0 = 3 does not fit: it is 4, fixed by B"):
            found.before.at(B=4, memory_0=3, T=5, memory_1=4)

    def test_the_batch_of_frames_is_that_of_their_samples(self):
        class Listening(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.frames = torch.nn.Conv1d(1, D, 10, 5)
                self.attend = torch.nn.MultiheadAttention(D, HEADS, batch_first=True)

            def forward(self, samples: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
                frames = self.frames(samples[:, None]).transpose(1, 2)
                return self.attend(queries, frames, frames, need_weights=False)[0]

        found = fxreuse.report(Listening().eval(), None, (torch.randn(2, 501), torch.randn(2, 5, D)), device="A100")
        assert set(found.before.symbols) == {"B", "T", "samples_1"}

    @pytest.mark.parametrize("length", [10**12, 10**17])  # of a map's bytes, and of the input's
    def test_more_bytes_than_can_be_counted(self, report, length):
        found = report("2x2 lowering=materialize")
        with pytest.raises(InputError, match=rf"x of 2×{length}×16 a tensor would take more bytes.*Give smaller sizes"):
            print(found.after.at(B=2, T=length).peak_bytes)

    def test_devices(self, report):
        with pytest.raises(InputError, match=r"no device 'abacus'"):
            report(device="abacus")
        with pytest.raises(InputError, match="float32"):
            report(device=dataclasses.replace(Device.preset("A100"), dtypes={}))

    @pytest.mark.parametrize(
        ("device", "wanted"),
        [(Device.preset("A100"), "recompute"), (dataclasses.replace(SERVER_CPU, score=1e-6), "materialize")],
        ids=["accelerator", "slow softmax"],
    )
    def test_lowerings_are_chosen_for_the_device(self, report, device, wanted):
        chosen = report("2x2", device=device)
        assert {decision.lowering for decision in chosen.record.decisions} == {wanted}
        assert chosen.after.macs == report(f"2x2 lowering={wanted}", device=device).after.macs


class TestForms:
    def test_text(self, found):
        text = str(found)
        assert "Model, plan 2x2 lowering=materialize" in text
        assert "Latency is predicted for A100" in text
        assert "MACs, before: 128·B·T² + 8,304·B·T" in text
        assert "T = 8" in text
        assert "keys and values of a token: 512 B before, 384 B after" in text

    def test_markdown(self, found):
        text = found.to_markdown()
        assert text.startswith("## Model, plan 2x2")
        assert "|--" in text

    def test_json(self, found):
        data = json.loads(found.to_json())
        assert data["before"]["params"] == found.before.params
        assert data["after"]["macs"] == str(found.after.macs)
        assert data["rows"][0]["before"] == list(found.rows[0].before)
        assert data["sizes"] == [{"B": 1, "T": 8}, {"B": 1, "T": 32}]

    def test_every_key_of_the_json_is_documented(self, found):
        page = (Path(__file__).parents[1] / "docs" / "cost_model.md").read_text(encoding="utf-8")
        lists = page.split("| key |")[1].split("\n\n")[0]

        def keys(data: Any) -> set[str]:
            if isinstance(data, list):
                return set().union(*map(keys, data))
            return set(data).union(*map(keys, data.values())) if isinstance(data, dict) else set()

        data = json.loads(found.to_json()) | {"relations": {}, "sizes": []}  # whose keys are names of sizes
        for when in ("before", "after"):
            data[when] |= {"weights": {}, "macs_by_kind": {}}  # of dtypes and of kinds
        assert keys(data) <= set(re.findall(r"`(\w+)`", lists))

    @pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
    def test_picture(self, found, tmp_path, suffix, start):
        pytest.importorskip("matplotlib")
        path = tmp_path / f"report.{suffix}"
        found.plot(path)
        assert path.read_bytes().startswith(start)
        if suffix == "svg":
            assert "GMACs" in path.read_text() or "<use" in path.read_text()

    def test_pictures_that_cannot_be(self, found, tmp_path):
        with pytest.raises(InputError, match=r"\.png or \.svg"):
            found.plot(tmp_path / "report.pdf")
        with pytest.raises(InputError, match=r"no folder .*nowhere' to write report\.svg into"):
            found.plot(tmp_path / "nowhere" / "report.svg")
        (tmp_path / "folder.svg").mkdir()
        with pytest.raises(InputError, match=r"folder\.svg' cannot be written \(Is a directory\)"):
            found.plot(tmp_path / "folder.svg")

    def test_pictures_of_one_size(self, report, tmp_path):
        with pytest.raises(InputError, match=r"one size, .*give several of T: .* or --size T=8,16"):
            report(sizes={"T": 8}).plot(tmp_path / "report.svg")
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        fixed = fxreuse.report(layer, "fiak", torch.randn(3, 10, 16), device="A100")
        with pytest.raises(InputError, match=r"give several of B: .* or --size B=3,6"):
            fixed.plot(tmp_path / "report.svg")

    def test_numbers_for_people(self):
        b, t = sympy.symbols("B T", integer=True, positive=True)
        assert cost_tables.polynomial(b * t - 3 * t**2 + 5) == "B·T - 3·T² + 5"
        assert [cost_tables.bytes_text(size) for size in (5, 2048, 3 * 2**30)] == ["5 B", "2.00 KiB", "3.00 GiB"]


def test_priors_are_costed_as_what_they_are_to_prune():
    """The length is fixed before and after; keys that go take their projections, scores and context with them."""
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3).eval()
    found = fxreuse.report(model, "fiak keys=0.3", torch.randn(2, 10, 16))
    batch = found.before.symbols["B"]
    saved = 3 * (2 * 3 * 16 * 16 + 2 * 10 * 3 * 16)  # K and V of three keys of ten; scores and context of ten queries
    assert found.before.macs - found.after.macs == saved * batch
    assert "T" not in found.before.symbols
    assert fxreuse.report(model, "fiak", torch.randn(2, 10, 16)).after.macs == found.before.macs


def test_scores_that_are_pruned_and_computed_all_the_same_are_no_part_of_the_algorithm():
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3).eval()
    found = fxreuse.report(model, "fiak scores=0.7 lowering=mask", torch.randn(2, 10, 16))
    batch = found.before.symbols["B"]
    saved = 3 * 2 * 2 * 70 * 8  # in three layers, of 100 scores of each of two heads of width 8, in both products
    assert found.after.macs == found.before.macs  # a mask skips nothing
    assert found.before.macs - found.after.macs_algorithmic == saved * batch
    assert found.after.at(B=3).macs_algorithmic == found.after.macs_algorithmic.subs(batch, 3)
    row = next(row for row in found.rows if row.name == "MACs, as pruned")
    assert row.after[0] < found.rows[0].after[0]
    assert row.before == found.rows[0].before
    assert "MACs that the pruned algorithm asks for" in str(found)
    assert "60/200         0.0 %                    mask" in str(found)
    assert "| 60/200" in found.to_markdown()
    sites = json.loads(found.to_json())["pruned"]
    assert [(site["scores_kept"], site["skipped_share"]) for site in sites] == [(60, 0)] * 3


def test_command_line(tmp_path, capsys):
    path = tmp_path / "zoo.py"
    path.write_text(
        "import torch\n"
        "def encoder():\n"
        "    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)\n"
        "    return torch.nn.TransformerEncoder(layer, 2), torch.randn(2, 7, 16)\n"
    )
    picture = tmp_path / "picture.png"
    given = ["report", f"{path}:encoder", "--plan", "2x1", "--size", "T=8,64", "--breakdown", "--plot", str(picture)]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "saved in" in out
    assert "reused attention" in out
    assert picture.exists()
    with pytest.raises(SystemExit, match="2"):
        main(["report", "x.py:y", "--size", "T=many"])
    with pytest.raises(SystemExit, match="2"):
        main(["report", "x.py:y", "--json", "--markdown"])
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "T=8", "--size", "T=16"], "T is given twice; several values go together: --size T=8,16"),
        (["--plot", "picture.pdf"], r"ends in .png or .svg, found 'picture.pdf'"),
        (["--plot", "nowhere/picture.png"], "no folder 'nowhere'"),
    ],
)
def test_bad_options_are_said_before_anything_is_built(options, message, capsys):
    assert main(["report", "nowhere.py:model", *options]) == 2
    assert message in capsys.readouterr().err
