"""The command line: what it prints, where, and with which exit code; and the progress display."""

import functools
import io
import json
import subprocess
import sys
import threading
import time
import wave

import pytest

import fxreuse
from fxreuse.checking import checks
from fxreuse.checking.measure import interleaved
from fxreuse.command.cli import main
from fxreuse.command.progress import Progress

pytest.importorskip("transformers")

TINY = (
    "num_hidden_layers=4 hidden_size=16 num_attention_heads=2 intermediate_size=32 conv_dim=[8,8] conv_kernel=[10,3] "
    "conv_stride=[5,2] num_conv_pos_embeddings=16 num_conv_pos_embedding_groups=4"
)
HUBERT = [part for setting in TINY.split() for part in ("--set", setting)]
SHALLOW = [*HUBERT, "--set", "num_hidden_layers=2"]


@pytest.fixture
def factory(tmp_path):
    """A factory of an encoder with its example inputs."""
    path = tmp_path / "zoo.py"
    path.write_text(
        "import torch\n"
        "def encoder(layers: int = 4):\n"
        "    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)\n"
        "    return torch.nn.TransformerEncoder(layer, layers), torch.randn(2, 7, 16)\n"
    )
    return f"{path}:encoder"


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch):
    """What is printed does not depend on how long it was timed."""
    monkeypatch.setattr(checks, "interleaved", lambda calls, seconds: interleaved(calls, seconds=0.05, rounds=3))


@pytest.fixture
def _compiled_by_no_compiler(monkeypatch):
    """Where the inductor, which takes ten seconds, is not what the test is about."""
    monkeypatch.setattr(fxreuse, "verify", functools.partial(fxreuse.verify, compile="eager"))


# inspect


def test_inspect_lists_the_attentions(capsys):
    assert main(["inspect", "transformers:HubertConfig", *HUBERT]) == 0
    out, _ = capsys.readouterr()
    assert "stack encoder.layers.{i}·self: 4 layers" in out
    assert "0…3       encoder.layers.{0…3}.attention" in out
    assert "plans    2x2" in out


def test_inspect_takes_a_factory_with_inputs_and_a_target(factory, capsys):
    assert main(["inspect", factory, "--target", "layers.1"]) == 0
    assert "stack self_attn·self: 1 layer\n" in capsys.readouterr().out


def test_inspect_prints_json_and_every_attention(factory, capsys):
    assert main(["inspect", factory, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["stacks"][0]["attentions"]) == 4
    assert main(["inspect", factory, "--all", "--set", "layers=2"]) == 0
    out = capsys.readouterr().out
    assert "layers.0.self_attn " in out
    assert "layers.1.self_attn " in out


# verify


def test_verify_prints_json(factory, capsys):
    assert main(["verify", factory, "--plan", "2x2", "--set", "layers=4", "--no-compile", "--json"]) == 0
    out, err = capsys.readouterr()
    assert isinstance(json.loads(out), dict)
    assert "doing: applying 2x2" in err


def test_verify_prints_a_table(factory, capsys):
    assert main(["verify", factory, "--plan", "2x*", "--no-compile"]) == 0
    assert capsys.readouterr().out.strip()


def test_failed_verdict_is_exit_code_1(factory, monkeypatch):
    class Failed:
        passed = False

        def to_json(self):
            return "{}"

    monkeypatch.setattr(fxreuse, "verify", lambda *_, **__: Failed())
    assert main(["verify", factory, "--plan", "2x2", "--json"]) == 1


# demo


def test_demo_on_a_tiny_model_says_everything(capsys):
    assert main(["demo", "--plan", "2x1", "--seconds", "0.2", *SHALLOW]) == 0
    out, err = capsys.readouterr()
    for expected in ("random, drawn from a fixed seed", "1 × 3,200 samples", "plan     2x1", "the 2 attentions"):
        assert expected in out
    for expected in ("parameters", "MACs", "attention maps", "passed"):
        assert expected in out
    assert "doing: finding the attentions" in err


@pytest.mark.usefixtures("_compiled_by_no_compiler")
def test_demo_takes_audio_and_prints_json(tmp_path, capsys):
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8_000)
        file.writeframes(bytes(range(256)) * 20)
    assert main(["demo", "--plan", "2x1", "--audio", str(path), "--seconds", "0.25", "--json", *SHALLOW]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["passed"] is True
    assert data["weights"] == "random"
    assert data["inputs"] == "0.2 s of a.wav: 1 × 4,000 samples at 16 kHz"
    assert data["after"]["params"] < data["before"]["params"]
    assert data["after"]["macs"] < data["before"]["macs"]


@pytest.mark.usefixtures("_compiled_by_no_compiler")
def test_demo_uses_the_inputs_of_a_factory(factory, capsys):
    assert main(["demo", "--model", factory, "--plan", "2x2"]) == 0
    out, _ = capsys.readouterr()
    assert "the factory's own example inputs" in out
    assert "as the factory made them" in out


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere.py:make"], "fxreuse: model 'nowhere.py:make': there is no file 'nowhere.py'"),
        (["inspect", "bert"], "is in no known form"),
        (["inspect", "transformers:HubertConfig", "--set", "layers=2"], "has no setting 'layers'"),
        (["demo", "--audio", "none.wav", *HUBERT], "audio 'none.wav': cannot be read"),
        (["demo", "--seconds", "inf", *HUBERT], "--seconds: expected a positive number, found inf"),
        (["inspect", "FACTORY", "--target", "layer.0"], "no submodule 'layer.0'; did you mean 'layers.0'"),
        (["demo", "--seconds", "-1", *HUBERT], "--seconds: expected a positive number, found -1"),
        (["demo", "--model", "FACTORY", "--audio", "a.wav"], "takes no waveform"),
        (["verify", "FACTORY", "--plan", "nonsense"], "nonsense"),
        (["verify", "FACTORY", "--plan", "3x3"], "4 layers"),
    ],
)
def test_errors_are_sentences_on_stderr(arguments, message, factory, capsys):
    assert main([factory if argument == "FACTORY" else argument for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" or arguments[0] == "demo"
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["frobnicate"], "invalid choice"),
        (["verify", "a.py:b"], "--plan"),
        (["inspect", "a.py:b", "--set", "layers"], "expected NAME=VALUE, found 'layers'"),
        (["demo", "--seconds", "ten"], "invalid float value"),
    ],
)
def test_bad_usage_is_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_interruption_is_exit_code_130(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fxreuse.command.model_spec.resolve", interrupted)
    assert main(["inspect", "a.py:b"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_python_m_fxreuse_works_and_passes_the_exit_code_on():
    done = subprocess.run([sys.executable, "-m", "fxreuse", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["fxreuse", "0.1.0"]
    done = subprocess.run([sys.executable, "-m", "fxreuse", "inspect", "bert"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("fxreuse: model 'bert' is in no known form")


# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_in_a_log_is_one_line_per_step():
    log = io.StringIO()
    with Progress(log) as progress:
        progress("capturing")
        progress("compiling")
    assert log.getvalue() == "doing: capturing\ndoing: compiling\n"


def test_progress_on_a_terminal_counts_and_cleans_up():
    terminal = Terminal()
    with Progress(terminal, interval=0.01) as progress:
        progress("compiling")
        deadline = time.monotonic() + 5
        while terminal.getvalue().count("compiling") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert terminal.getvalue().count("compiling") >= 3
    assert terminal.getvalue().endswith("\r\x1b[2K")
    assert "fxreuse-progress" not in [thread.name for thread in threading.enumerate()]


def test_progress_ends_when_its_block_raises():
    def compile_and_fail():
        with Progress(Terminal(), interval=0.01) as progress:
            progress("compiling")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        compile_and_fail()
    assert "fxreuse-progress" not in [thread.name for thread in threading.enumerate()]
