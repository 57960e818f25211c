"""The command ``evaluate``: accuracy of trained networks under attacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import rich.console
import typer
from rich.markup import escape

from fastadv.cli.shared_options import Plugin, TrustCode
from fastadv.errors import Interrupted
from fastadv.storage.printable import printable
from fastadv.storage.trust import trusting

if TYPE_CHECKING:
    from fastadv.run.several import ScoreTable


def evaluate(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="run folders; seeds of a method form one row"),
    ],
    attacks: Annotated[
        str, typer.Option(help="clean, fgsm, pgd-20, pgd-50-10, cw, autoattack, ... with commas")
    ] = "clean,fgsm,pgd-20",
    which: Annotated[
        str, typer.Option(help="best or last weights, or both and their difference")
    ] = "best",
    eps: Annotated[str | None, typer.Option(help="radius, if not the run's")] = None,
    alpha: Annotated[
        str | None, typer.Option(help="step of attacks with several, in pixels [the run's, eps/4]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="evaluate on this many images only")] = None,
    seed: Annotated[int, typer.Option(help="seed of the attacks")] = 0,
    format_: Annotated[
        str, typer.Option("--format", help="table, or a paper's as markdown, latex or csv")
    ] = "table",
    trust_code: TrustCode = False,
    plugin: Plugin = None,
) -> None:
    """Test accuracy of runs' weights under attacks. Each result is kept in the run folder's
    evaluations.jsonl; an interrupted evaluation continues from there."""
    from fastadv.cli.score_table import require_format
    from fastadv.run.console import Console, Terminal
    from fastadv.run.eval_pass import EvaluationStopped
    from fastadv.run.several import evaluate_runs, table_of_one

    require_format(format_)
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
            table = evaluate_runs(runs, attacks, **options, console=console)
        except EvaluationStopped as stopped:
            if stopped.scores and len(runs) == 1 and which != "both":
                _show(table_of_one(runs[0], which, stopped.scores), format_)
            raise Interrupted(
                f"Stopped under {stopped}; the same command continues from there."
            ) from None
    _show(table, format_)


def _show(table: ScoreTable, format_: str) -> None:
    from fastadv.cli.score_table import FORMATS, meaning, terminal

    if format_ != "table":
        print(FORMATS[format_](table), end="")
        return
    out = rich.console.Console(highlight=False)
    out.print(terminal(table))
    runs = [run for method in table.methods for run in method.runs]
    where = "the evaluations.jsonl of each run"
    if len(runs) == 1:
        where = f"{escape(printable(runs[0]))}/evaluations.jsonl"
    said = f"{table.said}; {meaning(table)}; kept in {where}"
    if table.stored:
        said += f", evaluated before: {escape(', '.join(table.stored))}"
    out.print(said, soft_wrap=True)
