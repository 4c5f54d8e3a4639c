"""Settings: texts by name (``num_hidden_layers=12``), read as the config or factory that takes them asks for."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import FxReuseError


class ModelSpecError(FxReuseError, ValueError):
    """A model specification, or a setting of one, that does not lead to a model."""


def parse_setting(name: str, text: str, annotation: Any) -> Any:
    """The value that a setting's text stands for, by the type that is asked for.

    >>> parse_setting("layers", "12", int), parse_setting("dropout", "0", float | None), parse_setting("k", "[3]", list)
    (12, 0.0, [3])
    """
    kinds = _kinds(annotation)
    readers: list[tuple[type, Callable[[str], Any]]] = [
        (type(None), {"none": None, "null": None}.__getitem__),
        (bool, {"true": True, "yes": True, "false": False, "no": False}.__getitem__),
        (int, int),
        (float, float),
    ]
    for kind, read in readers:
        if kind in kinds or not kinds:
            try:
                return read(text.lower())
            except (KeyError, ValueError):
                continue
    structures = kinds & {list, tuple, dict}
    if structures or not kinds:
        value = _structure(text)
        if value is not None:
            return tuple(value) if structures == {tuple} else value
    if str in kinds or not kinds:
        return text
    asked = " or ".join(sorted("none" if kind is type(None) else kind.__name__ for kind in kinds))
    shape = "; a list or dict is written as JSON, [512, 512]" if structures else ""
    raise ModelSpecError(f"setting {name!r}: expected {asked}, found {text!r}{shape}")


def _structure(text: str) -> list[Any] | dict[str, Any] | None:
    """The list or dict that a text is in JSON, if it is one."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, (list, dict)) else None


def _kinds(annotation: Any) -> set[type]:
    """The plain types that an annotation allows; empty where it does not say."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = [_kinds(part) for part in typing.get_args(annotation)]
        return set().union(*parts) if all(parts) else set()
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}
    if origin is typing.Annotated:
        return _kinds(typing.get_args(annotation)[0])
    kind = origin or annotation
    return {kind} if kind in (type(None), bool, int, float, str, list, tuple, dict) else set()


def annotation_of(annotation: Any, default: Any) -> Any:
    """An annotation, or the type of the default value where there is none that can be read."""
    if annotation is not inspect.Parameter.empty and not isinstance(annotation, str):
        return annotation
    unknown = default is None or default is inspect.Parameter.empty or default is dataclasses.MISSING
    return None if unknown else type(default)


def check_names(owner: str, settings: Mapping[str, str], known: Mapping[str, Any]) -> None:
    """Raise where a setting has a name that its owner does not know."""
    for name in settings:
        if name not in known:
            raise ModelSpecError(f"{owner} has no setting {name!r}; {near(name, known)}")


def near(name: str, known: Iterable[str]) -> str:
    """What there is in place of an unknown name: the close ones, else a list."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=4)
    if close:
        return f"did you mean {', '.join(close)}?"
    listed = ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")
    return f"there is {listed or 'nothing to call'}"
