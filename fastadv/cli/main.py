"""The command line: train, evaluate, compare, attacks, methods, doctor, export."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import rich.console
import typer
from rich.markup import escape

from fastadv.cli.attacks import attacks
from fastadv.cli.compare import compare
from fastadv.cli.evaluate import evaluate
from fastadv.cli.max_time import seconds_of
from fastadv.cli.misspelt import misspelt
from fastadv.cli.no_number import no_number
from fastadv.cli.shared_options import Plugin, TrustCode
from fastadv.engine.process import stop
from fastadv.engine.process.one_voice import first_to_speak, is_first
from fastadv.errors import (
    GO_ON,
    Interrupted,
    ProcessLost,
    TrainingError,
    UserError,
    exit_code,
)
from fastadv.storage.printable import safe_sentence
from fastadv.storage.trust import trusting


def main() -> None:
    """Run the command line; a user's mistake is one sentence and exit code 2."""
    with stop.handled():
        _main()


def _main() -> None:
    errors = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)

    def say(kind: str, sentence: object) -> None:
        if kind == "warning" and not is_first():
            return
        colour = "yellow" if kind == "warning" else "red"
        errors.print(f"[{colour}]{kind}:[/] {escape(safe_sentence(sentence))}")

    # The command line shows a warning as a sentence, without its place in the code.
    warnings.showwarning = lambda message, *_: say("warning", message)
    words = sys.argv[1:]
    if words[:1] == ["--"]:  # the end of options before the command, of which there are none
        words = words[1:]
    try:
        words = _load_plugins(words)
        if words[:1] == ["train"] and not {"--help", "--help-all"}.isdisjoint(words):
            print(_train_help(words), end="")
            sys.exit(0)
        command = application(words[0] if words else "")
        code = command(args=words, standalone_mode=False)
    except (UserError, TrainingError) as error:
        if first_to_speak():
            say("error", error)
        code = GO_ON if isinstance(error, ProcessLost) else 2
    except Interrupted as stopped:
        if first_to_speak():
            errors.print(escape(safe_sentence(stopped)))
        code = exit_code(stopped.by)
    except stop.Stopped as stopped:
        if first_to_speak():
            errors.print(stop.nothing_saved(stopped.by))
        code = exit_code(stopped.by)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        # The class of usage errors depends on the click that typer brings; all have this method.
        if not hasattr(error, "format_message"):
            raise
        sentence = misspelt(error) or no_number(error) or error.format_message()
        if sentence and first_to_speak():  # none beside the help of a bare `fastadv`
            say("error", sentence)
        code = 2
    sys.exit(code)


def _load_plugins(words: list[str]) -> list[str]:
    """``words`` without ``--plugin FILE``; the files are run now, since what they register has
    options of its own."""
    left: list[str] = []
    waiting = iter(words)
    for word in waiting:
        name, given, value = word.partition("=")
        if word == "--":
            return [*left, word, *waiting]
        if name != "--plugin":
            left.append(word)
            continue
        path = value if given else next(waiting, "")
        if not path:
            raise UserError("--plugin takes the path of a Python file with your parts.")
        from fastadv.algorithms.plugins import load_file

        load_file(path)
    return left


def _train(given: dict[str, Any]) -> None:
    """Train a network. Without options: APART on digits."""
    limit = given.pop("max_time", None)
    if limit is not None:
        stop.allow(seconds_of(limit))
    from fastadv.run.onward import train_or_resume
    from fastadv.run.request import RunRequest, setting_types
    from fastadv.run.train import resume, train

    path = given.pop("resume", None)
    begin = train_or_resume if path == "auto" else train
    with trusting(given.pop("trust_code", False)):
        if path is not None and path != "auto":
            if given:
                flags = ", ".join("--" + name.replace("_", "-") for name in given)
                raise UserError(f"--resume continues a run as it was begun; omit {flags}.")
            resume(path)
            return
        settings = {name: given.pop(name) for name in list(given) if name in setting_types()}
        begin(RunRequest(**settings, options=given))


def _train_help(words: list[str]) -> str:
    """The common options; all with ``--help-all``; with ``--method`` those of its parts."""
    method = next(
        (
            word.partition("=")[2] if "=" in word else after
            for word, after in zip(words, [*words[1:], ""], strict=True)
            if word.partition("=")[0] == "--method"
        ),
        None,
    )
    if method is not None or "--help-all" in words:
        from fastadv.cli.train_help import full

        return full(method)
    # Not built but read: the options of the parts need torch (``train_help.py`` writes the file).
    return Path(__file__).with_name("train_help.txt").read_text(encoding="utf-8")


def _train_command() -> Callable[..., None]:
    from fastadv.cli.flags import train_parameters, with_options

    resume = inspect.Parameter(
        "resume",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[str | None, typer.Option("--resume")],
    )
    max_time = inspect.Parameter(
        "max_time",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[str | None, typer.Option("--max-time")],
    )
    trust_code = inspect.Parameter(
        "trust_code", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=TrustCode
    )
    return with_options(_train, [resume, max_time, trust_code, *train_parameters()])


def methods(
    name: Annotated[str | None, typer.Argument(help="a method to explain")] = None,
    data: Annotated[str, typer.Option(help="explain it for a run on this data set")] = "digits",
    variant: Annotated[str | None, typer.Option(help="explain this published form of it")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print docs/methods.md")] = False,
    plugin: Plugin = None,
) -> None:
    """List the methods, or explain one."""
    if markdown:
        from fastadv.cli.explain import markdown as as_markdown

        print(as_markdown(), end="")
    elif name is None and variant is not None:
        raise UserError("--variant is a form of one method: name the method before it.")
    elif name is None:
        from fastadv.cli.listing import listing

        print(listing())
    else:
        from fastadv.cli.explain import explain

        rich.console.Console(highlight=False).print(explain(name, data, variant))


def doctor() -> None:
    """Say what this machine can do, and what fastadv will use."""
    from fastadv.cli.doctor import report

    rich.console.Console(highlight=False, soft_wrap=True).print(report())


def export(
    run: Annotated[str, typer.Argument(help="a run folder")],
    out: Annotated[
        Path | None,
        typer.Option(help="file to write: .safetensors, .pt2 (torch), .onnx [model.safetensors]"),
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="safetensors, torch or onnx [as the suffix]")
    ] = None,
    which: Annotated[
        str, typer.Option(help="best or last weights, or a kept epoch's: 10")
    ] = "best",
    trust_code: TrustCode = False,
    plugin: Plugin = None,
) -> None:
    """Write a run's network: its weights, or a program that needs no fastadv."""
    from fastadv.run.export import export_run

    with trusting(trust_code):
        said = export_run(run, out, which, form)
    rich.console.Console(highlight=False, soft_wrap=True).print(escape(said))


def pseudo_label(
    run: Annotated[str, typer.Argument(help="the run folder of a trained network")],
    images: Annotated[str, typer.Option(help=".npz with images (N,H,W,C) uint8")],
    out: Annotated[str, typer.Option(help=".npz to write, for --unlabelled")],
    trust_code: TrustCode = False,
    plugin: Plugin = None,
) -> None:
    """Label unlabelled images with a run's best network, for RST."""
    from fastadv.run.finished import load_run
    from fastadv.run.pseudo_labels import write_pseudo_labels

    with trusting(trust_code):
        _, data, _ = load_run(run, "best")
        counts = write_pseudo_labels(run, images, out, data.num_classes)
    shares = ", ".join(f"{label}: {count}" for label, count in counts.items())
    rich.console.Console(highlight=False, soft_wrap=True).print(
        f"wrote {escape(out)}; images per class: {shares}"
    )


def application(command: str) -> typer.Typer:
    """The commands. The options of train and bench are there when ``command`` is that one: they
    need torch, which the help of the others must not wait for."""
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        help="Fast adversarial training: `fastadv train --method apart --amp` runs as it is.",
    )
    app.command("train", help=_train.__doc__)(_train_command() if command == "train" else _later)
    app.command()(evaluate)
    app.command()(compare)
    app.command()(attacks)
    app.command()(methods)
    app.command()(doctor)
    app.command()(export)
    app.command("pseudo-label")(pseudo_label)
    if command == "bench":
        from fastadv.benchmark.command import bench

        app.command("bench")(bench)
    else:
        app.command("bench", help="Time steps against the device's limits and peers.")(_later)
    return app


def _later() -> None:
    """Stands for a command that is not the one called."""
