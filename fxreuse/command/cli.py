"""The command line: ``fxreuse inspect``, ``fxreuse report``, ``fxreuse verify``, ``fxreuse demo``.

Exit codes: 0 all is well, 1 the check's verdict is "failed", 2 bad usage or a model or plan that cannot be served.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fxreuse

from ..errors import FxReuseError, InputError
from ..reports.cost_plot import check_picture, pyplot
from ..reports.cost_tables import breakdown
from ..reports.inspection import inspect_model
from . import demo, model_spec
from .progress import Progress

_MODEL_HELP = (
    "file.py:factory, package.module:factory, transformers:HubertConfig (random weights), "
    "or hf:NAME-OR-DIRECTORY (trained weights)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    >>> main(["inspect", "missing.py:make_model"])
    2
    """
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with warnings.catch_warnings(), _libraries_silenced():
        warnings.simplefilter("ignore")  # what libraries say to their developers
        warnings.simplefilter("always", fxreuse.TrainingWarning)
        warnings.showwarning = _show_warning
        try:
            passed: bool = options.run(options)
        except FxReuseError as error:
            print(f"fxreuse: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("fxreuse: interrupted", file=sys.stderr)
            return 130
    return 0 if passed else 1


@contextmanager
def _libraries_silenced() -> Iterator[None]:
    """Without the logs of libraries: what torch has to say of a failed attempt is in the message that follows."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _inspect(options: argparse.Namespace) -> bool:
    """Print the attentions of a model, and the plans that it takes."""
    with Progress() as progress:
        progress(f"loading {options.model}")
        loaded = model_spec.resolve(options.model, dict(options.set))
        found = inspect_model(loaded.model, loaded.example_inputs, target=options.target, progress=progress)
    print(found.to_json() if options.json else found.report(every=options.all))
    return True


def _report(options: argparse.Namespace) -> bool:
    """Print what a model costs, and what a plan saves of it."""
    if options.plot is not None:
        check_picture(options.plot)
        pyplot()
    sizes = _sizes(options.sizes)
    with Progress() as progress:
        progress(f"building {options.model} without weights")
        loaded = model_spec.resolve(options.model, dict(options.set), without_weights=True)
        progress("counting")
        found = fxreuse.report(
            loaded.model,
            options.plan,
            loaded.example_inputs,
            device=options.device,
            sizes=sizes,
            target=options.target,
        )
        text = found.to_json() if options.json else found.to_markdown() if options.markdown else str(found)
    print(text)
    if options.breakdown and not options.json:
        print(f"\n{breakdown(found, 'github' if options.markdown else 'simple')}")
    if options.plot is not None:
        found.plot(options.plot)
    return True


def _sizes(given: Sequence[tuple[str, list[int]]]) -> dict[str, int | list[int]] | None:
    """Sizes as `fxreuse.report` takes them: several values as a list."""
    names = [name for name, _ in given]
    if twice := [name for name in names if names.count(name) > 1]:
        values = ",".join(str(value) for name, values in given if name == twice[0] for value in values)
        raise InputError(f"--size: {twice[0]} is given twice; several values go together: --size {twice[0]}={values}")
    return {name: values if len(values) > 1 else values[0] for name, values in given} or None


def _verify(options: argparse.Namespace) -> bool:
    """Apply a plan and print what the check of the result says."""
    with Progress() as progress:
        progress(f"loading {options.model}")
        loaded = model_spec.resolve(options.model, dict(options.set))
        progress(f"applying {options.plan}")
        rewritten = fxreuse.apply(loaded.model, options.plan, loaded.example_inputs)
        result = fxreuse.verify(
            loaded.model,
            rewritten,
            loaded.example_inputs,
            compile=options.compile,
            breakdown=options.breakdown,
            progress=progress,
        )
    print(result.to_json() if options.json else result)
    return result.passed


def _demo(options: argparse.Namespace) -> bool:
    """Run the whole of it on HuBERT-base and ten seconds of audio."""
    request = demo.Request(
        model=options.model,
        settings=dict(options.set),
        plan=options.plan,
        audio=options.audio,
        seconds=options.seconds,
    )
    result = demo.run(request, say=_silent if options.json else _say)
    if options.json:
        print(result.to_json())
    return result.passed


def _say(text: Any) -> None:
    print(text, flush=True)


def _silent(_: Any) -> None:
    pass


def _parser() -> argparse.ArgumentParser:
    """The grammar of the command line."""
    parser = argparse.ArgumentParser(
        prog="fxreuse", description="Attention-map reuse in any Transformer, by rewriting its graph."
    )
    parser.add_argument("--version", action="version", version=f"fxreuse {importlib.metadata.version('fxreuse')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    inspect = commands.add_parser("inspect", help="list the attentions of a model, and plans that it takes")
    inspect.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    inspect.add_argument("--target", metavar="PATH", help="look only at this submodule, such as model.encoder")
    inspect.add_argument("--all", action="store_true", help="a row for every attention, not for every kind")
    inspect.set_defaults(run=_inspect)

    report = commands.add_parser("report", help="count what a model costs and what a plan saves, without weights")
    report.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    report.add_argument("--plan", help="for instance 2x6: groups of 2 layers, 6 of them; without it, the model alone")
    report.add_argument("--target", metavar="PATH", help="count only this submodule, such as model.encoder")
    report.add_argument("--device", metavar="NAME", help="what latency is predicted for, such as cpu or A100")
    report.add_argument(
        "--size",
        dest="sizes",
        metavar="NAME=VALUE[,VALUE…]",
        action="append",
        type=_size,
        default=[],
        help="a size to report at, such as B=1 or T=128,512,2048; repeatable",
    )
    report.add_argument("--breakdown", action="store_true", help="the parts of the model, too")
    report.add_argument("--plot", metavar="FILE", type=Path, help="draw MACs, memory and latency into a .png or .svg")
    form = report.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    report.set_defaults(run=_report)

    verify = commands.add_parser("verify", help="apply a plan, then measure the result against the original")
    verify.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    verify.add_argument("--plan", required=True, help="for instance 2x6: groups of 2 layers, 6 of them")
    verify.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    verify.add_argument("--breakdown", action="store_true", help="measure the time of every part, too")
    verify.set_defaults(run=_verify)

    demonstrate = commands.add_parser("demo", help="everything in one run, on HuBERT-base and ten seconds of audio")
    demonstrate.add_argument("--model", metavar="SPEC", default=demo.DEFAULT_MODEL, help=f"{_MODEL_HELP}; %(default)s")
    demonstrate.add_argument("--plan", default=demo.DEFAULT_PLAN, help="default %(default)s")
    demonstrate.add_argument("--audio", metavar="FILE.wav", type=Path, help="PCM audio in place of synthetic speech")
    demonstrate.add_argument(
        "--seconds", type=float, default=demo.DEFAULT_SECONDS, help="how much of the audio to use; default %(default)g"
    )
    demonstrate.set_defaults(run=_demo)

    for command in (inspect, report, verify, demonstrate):
        command.add_argument(
            "--set",
            metavar="NAME=VALUE",
            action="append",
            type=_setting,
            default=[],
            help="a field of the config or an argument of the factory, such as num_hidden_layers=12; repeatable",
        )
    for options in (inspect, form, verify, demonstrate):
        options.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _setting(text: str) -> tuple[str, str]:
    """The name and the text of a ``NAME=VALUE``."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {text!r}")
    return name, value


def _size(text: str) -> tuple[str, list[int]]:
    """The name and the values of a ``NAME=VALUE,VALUE``."""
    name, values = _setting(text)
    try:
        return name, [int(value) for value in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER or NAME=NUMBER,NUMBER…, found {text!r}") from None


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Print a warning as a sentence, without the line of code that it came from."""
    print(f"warning: {message}", file=sys.stderr)
