"""Model specifications: every form loads a model, every mistake is answered with what to do."""

import builtins
import json
import warnings

import pytest
import torch

from fxreuse import FxReuseError
from fxreuse.command.model_spec import ModelSpecError, load, resolve
from fxreuse.command.settings import parse_setting

transformers = pytest.importorskip("transformers")

TINY = {
    "num_hidden_layers": "2",
    "hidden_size": "16",
    "num_attention_heads": "2",
    "intermediate_size": "32",
    "conv_dim": "[8, 8]",
    "conv_kernel": "[10, 3]",
    "conv_stride": "[5, 2]",
    "num_conv_pos_embeddings": "16",
    "num_conv_pos_embedding_groups": "4",
}

FACTORIES = """
import torch

def make(width: int, depth: int = 2, bias=True):
    return torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=bias) for _ in range(depth)])

def with_inputs(width: int = 4):
    return torch.nn.Linear(width, width), torch.ones(3, width)

def anything(**settings):
    return torch.nn.Linear(settings["width"], 1)

def not_a_model():
    return 3

def fails():
    raise RuntimeError("the disk is full")

def leaves():
    raise SystemExit(3)

def typed(width: "int"):
    return torch.nn.Linear(width, width)

ready = torch.nn.Linear(2, 2)
"""


@pytest.fixture
def factories(tmp_path):
    path = tmp_path / "zoo.py"
    path.write_text(FACTORIES)
    return path


@pytest.fixture
def tiny_checkpoint(tmp_path):
    model = load("transformers:HubertConfig", TINY)
    folder = tmp_path / "tiny-hubert"
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def offline(monkeypatch):
    """The hub as it is without a network, at once instead of after its retries."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# Configs


def test_config_gives_an_eval_model_with_the_settings_in_it():
    model = load("transformers:HubertConfig", {**TINY, "hidden_dropout": "0", "mask_time_prob": "0.25"})
    assert type(model).__name__ == "HubertModel"
    assert not model.training
    assert len(model.encoder.layers) == 2
    assert model.config.conv_dim == [8, 8]
    assert model.config.hidden_dropout == 0.0
    assert model.config.mask_time_prob == 0.25


def test_random_weights_are_the_same_every_time_and_the_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    first, second = load("transformers:HubertConfig", TINY), load("transformers:HubertConfig", TINY)
    assert torch.rand(()) == expected
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_config_aliases_and_attention_implementation_are_settings():
    model = load(
        "transformers:GPT2Config", {"hidden_size": "8", "n_head": "2", "n_layer": "1", "attn_implementation": "eager"}
    )
    assert model.config.n_embd == 8
    assert model.config._attn_implementation == "eager"


def test_unknown_setting_names_its_near_misses():
    with pytest.raises(ModelSpecError, match=r"HubertConfig has no setting 'num_hiden_layers'.*num_hidden_layers"):
        load("transformers:HubertConfig", {"num_hiden_layers": "2"})


@pytest.mark.parametrize(
    ("setting", "text", "message"),
    [
        ("num_hidden_layers", "twelve", "setting 'num_hidden_layers': expected int, found 'twelve'"),
        ("conv_bias", "3", "setting 'conv_bias': expected bool, found '3'"),
        ("conv_dim", "8,8", "expected list or tuple, found '8,8'; a list or dict is written as JSON"),
        ("conv_dim", "[1]", "HubertConfig does not accept"),
    ],
)
def test_setting_of_the_wrong_type(setting, text, message):
    with pytest.raises(ModelSpecError, match=message.replace("[", r"\[")):
        load("transformers:HubertConfig", {setting: text})


def test_unknown_config_names_its_near_misses():
    with pytest.raises(ModelSpecError, match=r"no config class 'HubertConf'; did you mean .*HubertConfig"):
        load("transformers:HubertConf")
    with pytest.raises(ModelSpecError, match=r"no config class 'HubertModel'.*HubertConfig"):
        load("transformers:HubertModel")


def test_config_without_a_model_class():
    with pytest.raises(ModelSpecError, match="AutoModel knows no model for PreTrainedConfig; write a factory"):
        load("transformers:PreTrainedConfig")


def test_transformers_not_installed(monkeypatch):
    real_import = builtins.__import__

    def without(name, *rest, **options):
        if name == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return real_import(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    for spec in ("transformers:HubertConfig", "hf:facebook/hubert-base-ls960"):
        with pytest.raises(ModelSpecError, match=r"transformers is not installed; run: pip install 'fxreuse\[hf\]'"):
            load(spec)


# Checkpoints


def test_directory_gives_the_weights_that_were_saved(tiny_checkpoint):
    folder, model = tiny_checkpoint
    loaded = resolve(f"hf:{folder}")
    assert loaded.weights == "trained"
    assert not loaded.model.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name


def test_settings_change_the_config_of_a_checkpoint(tiny_checkpoint):
    folder, _ = tiny_checkpoint
    model = load(f"hf:{folder}", {"attn_implementation": "eager", "hidden_dropout": "0.5"})
    assert model.config._attn_implementation == "eager"
    assert model.config.hidden_dropout == 0.5
    with pytest.raises(ModelSpecError, match="HubertConfig has no setting 'layers'"):
        load(f"hf:{folder}", {"layers": "3"})


def test_parameters_that_the_checkpoint_does_not_have_are_announced(tiny_checkpoint):
    folder, _ = tiny_checkpoint
    with pytest.warns(
        UserWarning, match=r"parameters are not in the checkpoint and have random values: encoder\.layers\.2"
    ):
        load(f"hf:{folder}", {"num_hidden_layers": "3"})


def test_complete_checkpoint_loads_without_a_warning(tiny_checkpoint):
    folder, _ = tiny_checkpoint
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(f"hf:{folder}")


def test_directory_without_a_config(tmp_path):
    with pytest.raises(ModelSpecError, match=r"has no config\.json; expected one that save_pretrained wrote"):
        load(f"hf:{tmp_path}")


def test_directory_without_weights(tiny_checkpoint):
    folder, _ = tiny_checkpoint
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelSpecError, match=r"could not be loaded \(.*model\.safetensors.*check the files in it"):
        load(f"hf:{folder}")


def test_directory_with_weights_that_are_none(tiny_checkpoint):
    folder, _ = tiny_checkpoint
    (folder / "model.safetensors").write_text("not weights")
    with pytest.raises(ModelSpecError, match=r"could not be loaded \(.*\); check the files in it"):
        load(f"hf:{folder}")


def test_model_that_cannot_be_built_names_the_line():
    with pytest.raises(ModelSpecError, match=r"building it raised ValueError: .*hidden.*\(.*\.py, line \d+\)"):
        load("transformers:BertConfig", {"hidden_size": "15", "num_hidden_layers": "1", "vocab_size": "9"})


def test_directory_with_a_config_of_no_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"width": 3}))
    with pytest.raises(ModelSpecError, match="could not be loaded"):
        load(f"hf:{tmp_path}")


def test_directory_that_does_not_exist(tmp_path):
    with pytest.raises(ModelSpecError, match="there is no such directory"):
        load(f"hf:{tmp_path / 'nowhere'}")


@pytest.mark.usefixtures("offline")
def test_hub_that_cannot_be_reached():
    with pytest.raises(ModelSpecError, match="check the name and the connection, or give a local directory"):
        load("hf:fxreuse-tests/does-not-exist")


# Factories


def test_factory_of_a_file_takes_settings_by_its_signature(factories):
    model = load(f"{factories}:make", {"width": "3", "depth": "5", "bias": "no"})
    assert len(model) == 5
    assert model[0].bias is None
    assert not model.training


def test_factory_may_give_example_inputs(factories):
    loaded = resolve(f"{factories}:with_inputs")
    assert loaded.example_inputs.shape == (3, 4)
    assert loaded.weights == "factory"
    assert isinstance(load(f"{factories}:with_inputs"), torch.nn.Linear)


def test_factory_with_free_settings_and_a_ready_model(factories):
    assert load(f"{factories}:anything", {"width": "7"}).in_features == 7
    assert load(f"{factories}:ready").in_features == 2
    with pytest.raises(ModelSpecError, match="is a model already"):
        load(f"{factories}:ready", {"width": "7"})


def test_factory_of_a_module(factories, monkeypatch):
    monkeypatch.chdir(factories.parent)
    assert len(load("zoo:make", {"width": "3"})) == 2
    assert load("torch.nn:Identity") is not None


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        ("{zoo}:mak", {}, r"has no factory 'mak'; did you mean make"),
        ("{zoo}:zebra", {}, r"has no factory 'zebra'; there is anything, fails, leaves, make, not_a_model"),
        ("{zoo}:make", {}, r"factory 'make' needs width; give them with --set width=…"),
        ("{zoo}:make", {"wide": "3"}, r"factory 'make' has no setting 'wide'"),
        ("{zoo}:make", {"width": "wide"}, r"setting 'width': expected int, found 'wide'"),
        ("{zoo}:not_a_model", {}, r"return a torch.nn.Module, or \(model, example_inputs\); found int"),
        ("{zoo}:fails", {}, r"factory 'fails' raised RuntimeError: the disk is full \(.*zoo.py, line \d+\)"),
        ("{zoo}:leaves", {}, r"factory 'leaves' raised SystemExit: 3 \(.*zoo.py, line \d+\)"),
        ("{zoo}:typed", {"width": "wide"}, r"setting 'width': expected int, found 'wide'"),
        ("builtins:int", {}, r"'int' is no factory of a model \(no signature found"),
        ("{folder}/none.py:make", {}, r"there is no file '.*none.py'"),
        ("no_such_package.models:make", {}, r"no module named 'no_such_package'"),
        ("bert", {}, r"model 'bert' is in no known form; expected file.py:factory"),
        ("bert:", {}, r"no known form"),
        ("hf:", {}, r"no known form"),
    ],
)
def test_mistakes(factories, spec, settings, message):
    with pytest.raises(ModelSpecError, match=message) as caught:
        load(spec.format(zoo=factories, folder=factories.parent), settings)
    assert isinstance(caught.value, FxReuseError)


def test_file_that_is_no_python_is_named_with_the_line(tmp_path):
    (tmp_path / "broken.py").write_text("import torch\ndef make(:\n")
    with pytest.raises(ModelSpecError, match=r"running broken.py raised SyntaxError: .*broken.py, line 2\)"):
        load(f"{tmp_path / 'broken.py'}:make")


def test_file_that_does_not_run_is_named_with_the_line(tmp_path):
    (tmp_path / "broken.py").write_text("import torch\nwidth = 3 / 0\n")
    with pytest.raises(ModelSpecError, match=r"running broken.py raised ZeroDivisionError: .*broken.py, line 2\)"):
        load(f"{tmp_path / 'broken.py'}:make")


# Settings


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("3", int, 3),
        ("3", float | int, 3),
        ("3", float, 3.0),
        ("1e-5", float | None, 1e-5),
        ("none", int | None, None),
        ("None", str, "None"),
        ("True", bool | str, True),
        ("7", str, "7"),
        ("[1, 2]", list[int] | tuple[int, ...], [1, 2]),
        ("[1, 2]", tuple[int, ...], (1, 2)),
        ('{"a": 1}', dict[str, int] | None, {"a": 1}),
        ("gelu", None, "gelu"),
        ("12", None, 12),
        ("[1]", None, [1]),
    ],
)
def test_setting_is_read_by_its_type(text, annotation, value):
    read = parse_setting("name", text, annotation)
    assert read == value
    assert type(read) is type(value)
