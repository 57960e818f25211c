"""The command ``evaluate``: accuracy of trained networks under attacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import rich.console
import typer
from rich.markup import escape

from fastadv.cli import foreign_options as foreign
from fastadv.cli.shared_options import Plugin, TrustCode
from fastadv.errors import Interrupted
from fastadv.storage.printable import printable
from fastadv.storage.trust import trusting

if TYPE_CHECKING:
    from fastadv.run.eval_pass import EvalScores


def evaluate(
    run: Annotated[str | None, typer.Argument(help="a run folder")] = None,
    attacks: Annotated[
        str, typer.Option(help="clean, fgsm, pgd-20, pgd-50-10, cw, autoattack, ... with commas")
    ] = "clean,fgsm,pgd-20",
    which: Annotated[str, typer.Option(help="best or last weights")] = "best",
    eps: Annotated[str | None, typer.Option(help="radius, if not the run's")] = None,
    alpha: Annotated[
        str | None, typer.Option(help="step of attacks with several, in pixels [the run's, eps/4]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="evaluate on this many images only")] = None,
    seed: Annotated[int, typer.Option(help="seed of the attacks")] = 0,
    weights: foreign.Weights = None,
    model: foreign.Model = None,
    data: foreign.Data = None,
    data_root: foreign.DataRoot = None,
    download: foreign.Download = None,
    image_size: foreign.ImageSize = None,
    norm: foreign.Norm = None,
    normalize: foreign.Normalize = None,
    shortcut: foreign.Shortcut = None,
    width: foreign.Width = None,
    depth: foreign.Depth = None,
    stem: foreign.Stem = None,
    trust_code: TrustCode = False,
    plugin: Plugin = None,
) -> None:
    """Test accuracy of a run's weights under attacks, or of a network from elsewhere. Each result
    is kept in the run folder's evaluations.jsonl, or beside the weights in WEIGHTS.evaluations; an
    interrupted evaluation continues from there."""
    elsewhere = foreign.foreign_request(
        run, which, weights, model=model, data=data, data_root=data_root, download=download,
        image_size=image_size, norm=norm, normalize=normalize, shortcut=shortcut, width=width,
        depth=depth, stem=stem,
    )  # fmt: skip
    from fastadv.run.console import Console, Terminal
    from fastadv.run.eval_pass import EvaluationStopped
    from fastadv.run.finished import evaluate_run
    from fastadv.run.foreign import evaluate_foreign, load_foreign

    options: dict[str, Any] = {"eps": eps, "alpha": alpha, "limit": limit, "seed": seed}
    options["console"] = Console(Terminal(highlight=False, soft_wrap=True, stderr=True))
    with trusting(trust_code):
        try:
            if elsewhere is None:
                title, folder = f"{run}, {which} weights", str(run)
                scores = evaluate_run(str(run), attacks, which=which, **options)
            else:
                found = load_foreign(*elsewhere)
                title, folder = elsewhere[0], str(found.folder.path)
                rich.console.Console(highlight=False).print(escape(found.said), soft_wrap=True)
                scores = evaluate_foreign(found, attacks, **options)
        except EvaluationStopped as stopped:
            if stopped.scores:
                _show_scores(title, folder, stopped.scores)
            raise Interrupted(
                f"Stopped under {stopped}; the same command continues from there."
            ) from None
    _show_scores(title, folder, scores)


def _show_scores(title: str, folder: str, scores: EvalScores) -> None:
    import rich.table

    from fastadv.run.console import as_interval

    out = rich.console.Console(highlight=False)
    table = rich.table.Table(
        title=f"{escape(printable(title))}: test accuracy, % of {scores.n:,} images"
    )
    table.add_column("attack")
    table.add_column("accuracy", justify="right")
    table.add_column("95 % interval", justify="right")
    for attack, score in scores.items():
        table.add_row(attack, f"{100 * score:.2f}", as_interval(scores.interval(attack)))
    out.print(table)
    said = f"{scores.said}; kept in {escape(printable(folder))}/evaluations.jsonl"
    if scores.stored:
        said += f", evaluated before: {escape(', '.join(scores.stored))}"
    out.print(said, soft_wrap=True)
