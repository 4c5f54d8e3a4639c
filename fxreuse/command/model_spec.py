"""The models that the command line can name: one string, and settings beside it, becomes a model in eval mode.

=========================  ==========================================================================================
``file.py:factory``        a function (or class) of a Python file; the settings are its arguments
``package.module:factory`` the same, of an importable module
``transformers:NAMEConfig``  random weights, from a config of Hugging Face transformers; the settings are its fields
``hf:NAME-OR-DIRECTORY``   trained weights, from the hub or from a directory that ``save_pretrained`` wrote
=========================  ==========================================================================================

A factory returns a model, or a model and its example inputs. Weights that are drawn are drawn from a fixed seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import FxReuseError
from .settings import ModelSpecError, annotation_of, check_names, near, parse_setting

_FORMS = (
    "file.py:factory, package.module:factory, transformers:HubertConfig (random weights) or "
    "hf:NAME-OR-DIRECTORY (trained weights)"
)
_SEED = 0


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model that a specification named.

    ``example_inputs`` are those that a factory gave with it, else None. ``weights`` is ``"random"`` (from a config),
    ``"trained"`` (from a checkpoint) or ``"factory"`` (whatever the factory put there).
    """

    model: torch.nn.Module
    example_inputs: Any
    weights: str


def load(spec: str, settings: Mapping[str, str] | None = None) -> torch.nn.Module:
    """The model that `spec` names, in eval mode; see the module's docstring for the forms.

    >>> encoder = load("torch.nn:Linear", {"in_features": "4", "out_features": "2"})
    >>> encoder.weight.shape
    torch.Size([2, 4])
    """
    return resolve(spec, settings).model


def resolve(spec: str, settings: Mapping[str, str] | None = None, *, without_weights: bool = False) -> LoadedModel:
    """As `load`, with the example inputs that a factory gave and the kind of weights.

    Args:
        spec: one of the forms in the module's docstring.
        settings: texts by name, each read as the config's field or the factory's parameter of that name asks for.
        without_weights: build it on the meta device, where a model of any size takes no memory.

    Raises:
        ModelSpecError: an unknown form; a file, module, factory, config, directory or setting that does not exist.
    """
    with torch.device("meta") if without_weights else contextlib.nullcontext():
        loaded = _loaded(spec, settings or {})
    loaded.model.eval()
    return loaded


def _loaded(spec: str, settings: Mapping[str, str]) -> LoadedModel:
    place, separator, name = spec.rpartition(":")
    if spec.startswith("hf:") and spec != "hf:":
        return _pretrained(spec[len("hf:") :], settings)
    if not separator or not place or not name:
        raise ModelSpecError(f"model {spec!r} is in no known form; expected {_FORMS}")
    if place == "transformers":
        return _from_config(name, settings)
    return _from_factory(spec, _import(spec, place), name, settings)


def _import(spec: str, place: str) -> types.ModuleType:
    """The module of a factory: a Python file, or an importable name (also from the working directory)."""
    if place.endswith(".py"):
        path = Path(place).expanduser()
        if not path.is_file():
            raise ModelSpecError(f"model {spec!r}: there is no file {str(path)!r} (looked in {Path.cwd()})")
        with _blaming(f"model {spec!r}: running {path.name}"):
            return _import_file(path)
    with _blaming(f"model {spec!r}: importing {place}"), _importable(Path.cwd()):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise
            raise ModelSpecError(
                f"model {spec!r}: no module named {error.name!r} here or on Python's path. Known forms: {_FORMS}"
            ) from error


def _import_file(path: Path) -> types.ModuleType:
    """Run a Python file as a module of its own, with its folder importable, as `python file.py` would."""
    name = f"fxreuse_model_{path.stem}"
    source = importlib.util.spec_from_file_location(name, path)
    assert source is not None
    assert source.loader is not None
    module = importlib.util.module_from_spec(source)
    sys.modules[name] = module
    with _importable(path.resolve().parent):
        source.loader.exec_module(module)
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Put a folder first on Python's path for the time being."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _from_factory(spec: str, module: types.ModuleType, name: str, settings: Mapping[str, str]) -> LoadedModel:
    """Call a factory with the settings as its arguments."""
    factory = getattr(module, name, None)
    if not callable(factory):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ModelSpecError(f"model {spec!r}: {module.__name__} has no factory {name!r}; {near(name, there)}")
    if isinstance(factory, torch.nn.Module):
        if settings:
            raise ModelSpecError(f"model {spec!r} is a model already, not a factory: it takes no settings")
        return LoadedModel(factory, None, "factory")
    try:
        parameters = _signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise ModelSpecError(f"model {spec!r}: {name!r} is no factory of a model ({error})") from error
    accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = {
        key: annotation_of(p.annotation, p.default) for key, p in parameters.items() if p.kind is not p.VAR_KEYWORD
    }
    if not accepts_any:
        check_names(f"factory {name!r}", settings, hints)
    arguments = {key: parse_setting(key, text, hints.get(key)) for key, text in settings.items()}
    missing = [
        key
        for key, p in parameters.items()
        if p.default is p.empty and key not in arguments and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if missing:
        example = " ".join(f"--set {key}=…" for key in missing)
        raise ModelSpecError(f"model {spec!r}: factory {name!r} needs {', '.join(missing)}; give them with {example}")
    with _blaming(f"model {spec!r}: factory {name!r}"), _seeded():
        made = factory(**arguments)
    model, example_inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, torch.nn.Module):
        raise ModelSpecError(
            f"model {spec!r}: expected the factory to return a torch.nn.Module, or (model, example_inputs); "
            f"found {type(made).__name__}"
        )
    return LoadedModel(model, example_inputs, "factory")


def _signature(factory: Callable[..., Any]) -> inspect.Signature:
    """The signature of a factory, its annotations as types where they can be evaluated."""
    try:
        return inspect.signature(factory, eval_str=True)
    except (AttributeError, NameError, SyntaxError, TypeError):  # what annotations can raise that are no types
        return inspect.signature(factory)


def _from_config(name: str, settings: Mapping[str, str]) -> LoadedModel:
    """A model with random weights from a config class of transformers."""
    transformers = _transformers()
    config_class = getattr(transformers, name, None)
    if not (isinstance(config_class, type) and issubclass(config_class, transformers.PreTrainedConfig)):
        known = [key for key in dir(transformers) if key.endswith("Config")]
        close = [other for other in difflib.get_close_matches(name, known, n=4, cutoff=0.5) if other != name]
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ModelSpecError(f"model 'transformers:{name}': transformers has no config class {name!r}{hint}")
    config = _configured(config_class, config_class, settings)
    if config_class not in transformers.AutoModel._model_mapping:
        raise ModelSpecError(
            f"model 'transformers:{name}': transformers.AutoModel knows no model for {name}; "
            "write a factory that builds it and name it as file.py:factory"
        )
    with _blaming(f"model 'transformers:{name}': building it"), _seeded():
        return LoadedModel(transformers.AutoModel.from_config(config), None, "random")


def _pretrained(name: str, settings: Mapping[str, str]) -> LoadedModel:
    """A model with the weights of a checkpoint, from a directory or from the hub."""
    transformers = _transformers()
    folder = Path(name).expanduser()
    source = str(folder) if folder.is_dir() else name
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelSpecError(
                f"model 'hf:{name}': the directory has no config.json; "
                "expected one that save_pretrained wrote (config.json and model.safetensors)"
            )
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelSpecError(f"model 'hf:{name}': there is no such directory (looked in {Path.cwd()})")
    try:
        config_class = type(transformers.AutoConfig.from_pretrained(source))
        config = _configured(lambda **v: transformers.AutoConfig.from_pretrained(source, **v), config_class, settings)
        with _seeded():
            model, info = transformers.AutoModel.from_pretrained(source, config=config, output_loading_info=True)
    except ModelSpecError:
        raise
    except Exception as error:  # every format of weights, and every model, fails with exceptions of its own
        advice = (
            "check the files in it"
            if folder.is_dir()
            else "check the name and the connection, or give a local directory: hf:/path/to/model. "
            "For random weights in the same architecture use transformers:…Config"
        )
        raise ModelSpecError(f"model 'hf:{name}': could not be loaded ({_first_line(error)}); {advice}") from error
    if info["missing_keys"]:
        warnings.warn(
            f"model 'hf:{name}': {len(info['missing_keys'])} parameters are not in the checkpoint and have random "
            f"values: {', '.join(sorted(info['missing_keys'])[:4])}"
        )
    return LoadedModel(model, None, "trained")


def _transformers() -> Any:
    """The transformers library, or an error that says how to get it."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModelSpecError("transformers is not installed; run: pip install 'fxreuse[hf]'") from error
    return transformers


def _configured(make: Callable[..., Any], config_class: type, settings: Mapping[str, str]) -> Any:
    """A config with the settings in it: `make` called with their values, read as the config's fields ask for."""
    fields = {field.name: annotation_of(field.type, field.default) for field in dataclasses.fields(config_class)}
    aliases: Mapping[str, str] = getattr(config_class, "attribute_map", {})
    fields |= {alias: fields[name] for alias, name in aliases.items() if name in fields}
    fields["attn_implementation"] = str
    check_names(config_class.__name__, settings, fields)
    values = {name: parse_setting(name, text, fields[name]) for name, text in settings.items()}
    try:
        return make(**values)
    except OSError:
        raise
    except Exception as error:  # a config rejects values with exceptions of many kinds
        raise ModelSpecError(f"{config_class.__name__} does not accept {values}: {error}") from error


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    """Turn whatever a user's code raises into an error that names that code, and the line it happened in."""
    try:
        yield
    except FxReuseError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError):
            said, file, line = error.msg, error.filename, error.lineno
        else:
            last = traceback.extract_tb(error.__traceback__)[-1]
            said, file, line = _first_line(error), last.filename, last.lineno
        raise ModelSpecError(f"{what} raised {type(error).__name__}: {said} ({file}, line {line})") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


@contextmanager
def _seeded() -> Iterator[None]:
    """Draw random numbers from a fixed seed, and leave the caller's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        yield
