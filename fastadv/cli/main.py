"""The command line: train, evaluate, methods, doctor, export."""

from __future__ import annotations

import inspect
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import rich.console
import rich.table
import typer
from rich.markup import escape

from fastadv.errors import TrainingError, UserError
from fastadv.storage.printable import printable, safe_sentence
from fastadv.storage.trust import trusting

if TYPE_CHECKING:
    from fastadv.run.eval_pass import EvalScores

TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code", help="run the module:callable that run folders from elsewhere name"
    ),
]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Fast adversarial training: `fastadv train --method apart --amp` runs as it is.",
)


def main() -> None:
    """Run the command line; a user's mistake is one sentence and exit code 2."""
    errors = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)

    def say(kind: str, sentence: object) -> None:
        colour = "yellow" if kind == "warning" else "red"
        errors.print(f"[{colour}]{kind}:[/] {escape(safe_sentence(sentence))}")

    # A warning is a sentence for a person here, not a place in the code.
    warnings.showwarning = lambda message, *_: say("warning", message)
    from fastadv.run.train import Interrupted

    try:
        code = app(standalone_mode=False)
    except (UserError, TrainingError) as error:
        say("error", error)
        code = 2
    except Interrupted as stopped:
        errors.print(escape(safe_sentence(stopped)))
        code = 130
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        # Whichever click typer brings along, its usage errors know how to word themselves.
        if not hasattr(error, "format_message"):
            raise
        if error.format_message():  # none beside the help of a bare `fastadv`
            say("error", error.format_message())
        code = 2
    sys.exit(code)


def _train(given: dict[str, Any]) -> None:
    """Train a network. Without options: APART on digits."""
    from fastadv.run.request import RunRequest, setting_types
    from fastadv.run.train import resume, train

    path = given.pop("resume", None)
    with trusting(given.pop("trust_code", False)):
        if path is not None:
            if given:
                flags = ", ".join("--" + name.replace("_", "-") for name in given)
                raise UserError(f"--resume continues a run as it was begun; leave away {flags}.")
            resume(path)
            return
        settings = {name: given.pop(name) for name in list(given) if name in setting_types()}
        train(RunRequest(**settings, options=given))


def _register_train() -> None:
    from fastadv.cli.flags import train_parameters, with_options

    resume = inspect.Parameter(
        "resume",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            str | None,
            typer.Option(
                "--resume", help="continue the run in this folder", rich_help_panel="The run"
            ),
        ],
    )
    trust_code = inspect.Parameter(
        "trust_code", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=TrustCode
    )
    app.command("train")(with_options(_train, [resume, trust_code, *train_parameters()]))


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="a run folder")],
    attacks: Annotated[
        str, typer.Option(help="clean, fgsm, pgd-20, pgd-50-10, cw, autoattack, ... with commas")
    ] = "clean,fgsm,pgd-20",
    which: Annotated[str, typer.Option(help="best or last weights")] = "best",
    eps: Annotated[str | None, typer.Option(help="another radius than the run's")] = None,
    alpha: Annotated[
        str | None, typer.Option(help="step of attacks with several, in pixels [the run's, eps/4]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="evaluate this many test images only")] = None,
    seed: Annotated[int, typer.Option(help="seed of the attacks")] = 0,
    trust_code: TrustCode = False,
) -> None:
    """Test accuracy of a run's weights under attacks. Each result is kept in the run folder's
    evaluations.jsonl; what was interrupted goes on from there."""
    from fastadv.run.console import Console, Terminal
    from fastadv.run.eval_pass import EvaluationStopped
    from fastadv.run.finished import evaluate_run
    from fastadv.run.train import Interrupted

    options: dict[str, Any] = {
        "which": which,
        "eps": eps,
        "alpha": alpha,
        "limit": limit,
        "seed": seed,
    }
    console = Console(Terminal(highlight=False, soft_wrap=True, stderr=True))
    with trusting(trust_code):
        try:
            scores = evaluate_run(run, attacks, **options, console=console)
        except EvaluationStopped as stopped:
            if stopped.scores:
                _show_scores(run, which, stopped.scores)
            raise Interrupted(
                f"Stopped under {stopped}; the same command goes on from there."
            ) from None
    _show_scores(run, which, scores)


def _show_scores(run: str, which: str, scores: EvalScores) -> None:
    from fastadv.run.console import as_interval

    out = rich.console.Console(highlight=False)
    table = rich.table.Table(
        title=f"{escape(printable(run))}, {which} weights: test accuracy, % of {scores.n:,} images"
    )
    table.add_column("attack")
    table.add_column("accuracy", justify="right")
    table.add_column("95 % interval", justify="right")
    for attack, score in scores.items():
        table.add_row(attack, f"{100 * score:.2f}", as_interval(scores.interval(attack)))
    out.print(table)
    said = f"{scores.said}; kept in {escape(printable(run))}/evaluations.jsonl"
    if scores.stored:
        said += f", evaluated before: {escape(', '.join(scores.stored))}"
    out.print(said, soft_wrap=True)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="explain this method")] = None,
    data: Annotated[str, typer.Option(help="explain it for a run on this data set")] = "digits",
    markdown: Annotated[bool, typer.Option("--markdown", help="the table of docs/")] = False,
) -> None:
    """List the methods, or explain one."""
    from fastadv.cli.explain import explain, table
    from fastadv.cli.explain import markdown as as_markdown

    if markdown:
        print(as_markdown(), end="")
        return
    out = rich.console.Console(highlight=False)
    out.print(table() if name is None else explain(name, data))


@app.command()
def doctor() -> None:
    """Say what this machine can do, and what fastadv will use."""
    from fastadv.cli.doctor import report

    rich.console.Console(highlight=False, soft_wrap=True).print(report())


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="a run folder")],
    out: Annotated[Path, typer.Option(help="file to write")] = Path("model.safetensors"),
    which: Annotated[str, typer.Option(help="best or last weights")] = "best",
    trust_code: TrustCode = False,
) -> None:
    """Write a run's weights as safetensors."""
    from fastadv.run.finished import export_run

    with trusting(trust_code):
        export_run(run, out, which)
    rich.console.Console(highlight=False, soft_wrap=True).print(f"wrote {escape(str(out))}")


@app.command("pseudo-label")
def pseudo_label(
    run: Annotated[str, typer.Argument(help="the run folder of a trained network")],
    images: Annotated[str, typer.Option(help=".npz with images (N,H,W,C) uint8")],
    out: Annotated[str, typer.Option(help=".npz to write, for --unlabelled")],
    trust_code: TrustCode = False,
) -> None:
    """Label unlabelled images with a run's best network, for RST."""
    from fastadv.run.finished import load_run
    from fastadv.run.pseudo_labels import write_pseudo_labels

    with trusting(trust_code):
        _, data, _ = load_run(run, "best")
        counts = write_pseudo_labels(run, images, out, data.num_classes)
    shares = ", ".join(f"{label}: {count}" for label, count in counts.items())
    rich.console.Console(highlight=False, soft_wrap=True).print(
        f"wrote {escape(out)}; images a class: {shares}"
    )


def _register_bench() -> None:
    from fastadv.benchmark.command import bench

    app.command("bench")(bench)


_register_train()
_register_bench()
