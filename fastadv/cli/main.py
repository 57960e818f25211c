"""The command line: train, evaluate, compare, attacks, methods, doctor, export."""

from __future__ import annotations

import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from fastadv import __version__
from fastadv.cli import completion
from fastadv.cli.asked_help import asks_for_help, train_page
from fastadv.cli.attacks import attacks
from fastadv.cli.bench import bench
from fastadv.cli.beside_options import require_alone
from fastadv.cli.command_help import overview, page
from fastadv.cli.compare import compare
from fastadv.cli.evaluate import evaluate
from fastadv.cli.in_dashes import told_in_dashes
from fastadv.cli.invocation import with_invocation
from fastadv.cli.known_options import require_known_options
from fastadv.cli.max_time import seconds_of
from fastadv.cli.shared_options import Plugin, TrustCode
from fastadv.cli.usage_errors import sentence_of
from fastadv.cli.with_options import with_options
from fastadv.engine.process import stop
from fastadv.engine.process.one_voice import first_to_speak, is_first
from fastadv.errors import Interrupted, ProcessLost, TrainingError, UserError
from fastadv.exit_codes import ExitCode
from fastadv.printing.terminal import Terminal
from fastadv.run.spelling import as_flag
from fastadv.storage.printable import printable, safe_sentence
from fastadv.storage.trust import trusting

_LONG_WORD = re.compile(r"\S{400,}")  # given by mistake, such as a whole file


def main() -> None:
    """Run the command line; a user's mistake is one sentence and a code of its own."""
    # What a command says and is told ends with it: a second one in this process says it again.
    with stop.handled(), warnings.catch_warnings():
        _main()


def _main() -> None:
    errors = Terminal(stderr=True)

    def say(kind: str, sentence: object) -> None:
        if kind == "warning" and not is_first():
            return
        colour = "yellow" if kind == "warning" else "red"
        said = _LONG_WORD.sub(lambda word: printable(word[0]), safe_sentence(sentence))
        errors.print(f"[{colour}]{kind}:[/] {escape(said)}")

    # The command line shows a warning as a sentence, without its place in the code.
    warnings.showwarning = lambda message, *_: say("warning", message)
    words = sys.argv[1:]
    if words[:1] == ["--"]:  # the end of options before the command, of which there are none
        words = words[1:]
    try:
        typed, words = words, _load_plugins(words)
        if asks_for_help(words) or not (words or completion.asked_for()):
            print(_help(words), end="")
            sys.exit(ExitCode.DONE)
        if words[:1] in (["--install-completion"], ["--show-completion"]):
            completion.require_known_shell()
        if words == typed and words[:1] == ["train"] and not completion.asked_for():
            require_known_options(words)
        command = application(words[0] if words else "")
        code = command(args=words, prog_name="fastadv", standalone_mode=False)
    except (UserError, TrainingError) as error:
        if first_to_speak():
            say("error", error)
        code = ExitCode.GO_ON if isinstance(error, ProcessLost) else ExitCode.MISTAKE
    except Interrupted as stopped:
        said, code = stop.said_and_code(stopped.by, str(stopped))
        if first_to_speak():
            errors.print(escape(safe_sentence(said)))
    except stop.Stopped as stopped:
        said, code = stop.said_and_code(stopped.by, stop.nothing_saved(stopped.by))
        if first_to_speak():
            errors.print(said)
    except KeyboardInterrupt:
        code = ExitCode.CTRL_C
    except Exception as error:
        # The class of usage errors depends on the click that typer brings; all have this method.
        if not hasattr(error, "format_message"):
            raise
        if first_to_speak():
            say("error", sentence_of(error))
        code = ExitCode.MISTAKE
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
    from fastadv.run.onward import for_this_time, train_or_resume
    from fastadv.run.places import of_a_run
    from fastadv.run.request import RunRequest, setting_types
    from fastadv.run.seeds import seeds_in, train_seeds
    from fastadv.run.train import resume, train

    path = given.pop("resume", None)
    begin = train_or_resume if path == "auto" else train
    with trusting(given.pop("trust_code", False)), told_in_dashes(given):
        if path is not None and path != "auto":
            if get_close_matches(path, ["auto"], cutoff=0.6) and not os.path.lexists(path):
                raise UserError(f"There is no run folder {path!r}; did you mean --resume auto?")
            moved = {name: given.pop(name) for name in of_a_run() if name in given}
            changed = for_this_time(given)
            fixed = [as_flag(name) for name in given if name not in changed]
            if fixed:
                raise UserError(
                    f"--resume continues a run as it was begun; omit {', '.join(fixed)}."
                )
            resume(path, moved=moved, changed=changed)
            return
        config, name, dry = (given.pop(key, None) for key in ("config", "name", "dry_run"))
        settings = {name: given.pop(name) for name in list(given) if name in setting_types()}
        seeds = seeds_in(settings.pop("seed", None))
        request = RunRequest(**settings, seed=seeds[0], options=given)
        request = with_invocation(request, config, name)
        if dry:
            from fastadv.cli.dry_run import dry_run

            dry_run(request)
        elif len(seeds) > 1:
            train_seeds(request, [seed for seed in seeds if seed is not None])
        else:
            begin(request)


def _help(words: list[str]) -> str:
    """The help of the command in ``words``, or of all."""
    command = next((word for word in words if word in COMMANDS), None)
    if command is None:
        return overview(COMMANDS)
    if command == "train":
        return train_page(words)
    return page(command, CALLED[command])


def methods(
    name: Annotated[
        str | None,
        typer.Argument(help="a method to explain", autocompletion=completion.of("method")),
    ] = None,
    data: Annotated[str, typer.Option(help="explain it for a run on this data set")] = "digits",
    variant: Annotated[str | None, typer.Option(help="explain this published form of it")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print docs/methods.md")] = False,
    bibtex: Annotated[
        bool, typer.Option("--bibtex", help="print the BibTeX entries of its papers alone")
    ] = False,
    plugin: Plugin = None,
) -> None:
    """List the methods, or explain one."""
    given = dict(locals())
    if markdown:
        require_alone(methods, given, "--markdown prints a page of all methods", "markdown")
        from fastadv.cli.explain import markdown as as_markdown

        print(as_markdown(), end="")
    elif bibtex:
        from fastadv.cli.sources import bibtex_of

        if name is None:
            raise UserError("--bibtex is for one method: name it before.")
        own = ("bibtex", "name", "variant", "plugin")
        require_alone(methods, given, "--bibtex prints entries alone", *own)
        print(bibtex_of(name, variant))
    elif name is None and variant is not None:
        raise UserError("--variant is a form of one method: name the method before it.")
    elif name is None:
        require_alone(methods, given, "Without the name of a method all are listed", "plugin")
        from fastadv.cli.listing import listing

        print(listing())
    else:
        from fastadv.algorithms.recipes.table import METHODS, called_here
        from fastadv.cli.explain import explain

        ours = [] if name in METHODS else called_here(name)
        if len(ours) == 1:
            Terminal().print(f"{escape(printable(name))} is called {ours[0]} here")
            name = ours[0]
        Terminal().print(explain(name, data, variant))


def doctor(
    gpu: Annotated[
        bool,
        typer.Option(
            "--gpu",
            help=f"check the results of this GPU, in a minute; exit code {ExitCode.WRONG}: wrong",
        ),
    ] = False,
) -> None:
    """Say what this machine can do, and what fastadv will use."""
    from fastadv.cli.doctor import check_gpu, report

    console = Terminal()
    if not gpu:
        console.print(report())
    elif not check_gpu(console):
        raise typer.Exit(ExitCode.WRONG)


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
    Terminal().print(escape(said))


def pseudo_label(
    run: Annotated[str, typer.Argument(help="the run folder of a trained network")],
    images: Annotated[str, typer.Option(help=".npz with images (N,H,W,C) uint8")],
    out: Annotated[str, typer.Option(help=".npz to write, for --unlabelled")],
    trust_code: TrustCode = False,
    plugin: Plugin = None,
) -> None:
    """Label unlabelled images with a run's best network, for RST."""
    from fastadv.run.pseudo_labels import write_pseudo_labels

    with trusting(trust_code):
        counts = write_pseudo_labels(run, images, out)
    shares = ", ".join(f"{label}: {count}" for label, count in counts.items())
    Terminal().print(f"wrote {escape(out)}; images per class: {shares}")


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"fastadv {__version__}")
        raise typer.Exit


CALLED: dict[str, Callable[..., None]] = {
    "evaluate": evaluate,
    "compare": compare,
    "attacks": attacks,
    "methods": methods,
    "doctor": doctor,
    "export": export,
    "pseudo-label": pseudo_label,
    "bench": bench,
}
"""Name -> the command, for all but ``train``: its options need torch, which the others must not
wait for."""

COMMANDS = {
    "train": inspect.getdoc(_train) or "",
    **{name: " ".join((inspect.getdoc(each) or "").split()) for name, each in CALLED.items()},
}
"""Name -> what it does."""


def application(command: str) -> typer.Typer:
    """The commands. The options of train are there when ``command`` is that one, or as stored for
    a shell that completes a line."""
    app = typer.Typer(
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_top)
    for name, text in COMMANDS.items():
        app.command(name, help=text)(_implementation(name, command))
    return app


def _implementation(name: str, command: str) -> Callable[..., None]:
    if name in CALLED:
        return CALLED[name]
    if completion.asked_for():
        return with_options(_nothing, completion.parameters(name))
    if name != command:
        return _later
    from fastadv.cli.flags import train_parameters

    return with_options(_train, train_parameters())


def _top(
    version: Annotated[
        bool, typer.Option("--version", help="say which version this is", callback=_say_version)
    ] = False,
) -> None:
    """Fast adversarial training."""


def _nothing(given: dict[str, Any]) -> None:
    """Stands for a command whose options are completed."""


def _later() -> None:
    """Stands for a command that is not the one called."""
