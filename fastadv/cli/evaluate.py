"""The command ``evaluate``: accuracy of trained networks under attacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from fastadv.cli import completion
from fastadv.cli import foreign_options as foreign
from fastadv.cli.beside import Reference, attacks_beside, show_beside
from fastadv.cli.judging_words import require_words
from fastadv.cli.sanity import Other, Sanity, check, require_alone
from fastadv.cli.shared_options import Attacks, Mode, On, Plugin, SearchDtype, TrustCode
from fastadv.errors import UserError
from fastadv.printing.terminal import Terminal
from fastadv.storage.printable import printable
from fastadv.storage.trust import trusting

if TYPE_CHECKING:
    from fastadv.run.several import ScoreTable


ATTACKS = "clean,fgsm,pgd-20"


def evaluate(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN...", help="run folders; the seeds of a method form one row"),
    ] = None,
    attacks: Attacks = ATTACKS,
    which: Annotated[
        str,
        typer.Option(
            help="best or last weights, both and their difference, or a kept epoch's: 10",
            autocompletion=completion.of("--which"),
        ),
    ] = "best",
    eps: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="radius, if not the run's")
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(metavar="NUMBER", help="step of pgd and cw, in pixels [the run's, eps/4]"),
    ] = None,
    on: On = "test",
    limit: Annotated[int | None, typer.Option(help="evaluate on this many images only")] = None,
    seed: Annotated[int, typer.Option(help="seed of the attacks")] = 0,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="table, or a paper's in markdown, latex or csv",
            autocompletion=completion.of("--format"),
        ),
    ] = "table",
    time_limit: Annotated[
        str | None,
        typer.Option(metavar="MINUTES", help="time after which what is known is shown [none]"),
    ] = None,
    save_examples: Annotated[
        bool,
        typer.Option("--save-examples", help="write the adversarial examples too, into verdicts/"),
    ] = False,
    search_dtype: SearchDtype = "float32",
    mode: Mode = "auto",
    reference: Reference = False,
    sanity: Sanity = False,
    other: Other = None,
    weights: foreign.Weights = None,
    model: foreign.Model = None,
    data: foreign.Data = None,
    data_root: foreign.DataRoot = None,
    download: foreign.Download = None,
    image_size: foreign.ImageSize = None,
    skip_broken: foreign.SkipBroken = None,
    norm: foreign.Norm = None,
    normalize: foreign.Normalize = None,
    shortcut: foreign.Shortcut = None,
    width: foreign.Width = None,
    depth: foreign.Depth = None,
    stem: foreign.Stem = None,
    trust_code: TrustCode = False,
    plugin: Plugin = None,
) -> None:
    """Accuracy of runs under attacks, or of a network from elsewhere; on test images, if not --on
    others. Each result is kept in the run folder's evaluations.jsonl, or beside the weights in
    WEIGHTS.evaluations; an interrupted evaluation continues from there. With --sanity: whether
    attacks can work at all."""
    require_words(which=which, on=on, search_dtype=search_dtype, mode=mode)
    runs = runs or []
    told: dict[str, Any] = {"data": data, "data_root": data_root} if runs else {}
    elsewhere = foreign.foreign_request(
        runs[0] if runs else None, which, weights, model=model, data=data,
        data_root=data_root, download=download,
        image_size=image_size, skip_broken=skip_broken, norm=norm, normalize=normalize,
        shortcut=shortcut, width=width,
        depth=depth, stem=stem,
    )  # fmt: skip
    if sanity:
        require_alone(
            {
                "--attacks": attacks != ATTACKS,
                "--alpha": alpha,
                "--on": on != "test",
                "--format": format_ != "table",
                "--time-limit": time_limit,
                "--save-examples": save_examples,
                "--search-dtype": search_dtype != "float32",
                "--mode": mode != "auto",
                "--reference": reference,
            }
        )
        with trusting(trust_code):
            code = check(runs, elsewhere, which, told, eps=eps, limit=limit, seed=seed, other=other)
        raise typer.Exit(code)
    if other is not None:
        raise UserError("--other is for --sanity: add it, or omit --other.")
    from fastadv.cli.score_table import require_format
    from fastadv.run.console import Console
    from fastadv.run.eval_pass import EvaluationStopped
    from fastadv.run.eval_watch import Deadline
    from fastadv.run.finished import evaluate_run
    from fastadv.run.foreign import evaluate_foreign, load_foreign
    from fastadv.run.loaded import load_run
    from fastadv.run.several import evaluate_runs, table_of_file, table_of_run
    from fastadv.run.together import evaluating_together

    require_format(format_)
    if reference and format_ != "table":
        raise UserError(f"--reference prints a table of its own: omit --format {format_}.")
    if on != "test" and (reference or elsewhere is not None):
        why = "--reference" if reference else "A network from elsewhere"
        raise UserError(f"{why} is evaluated on test images: omit --on {on}.")
    beside = attacks_beside(attacks, runs, which) if reference else []
    options: dict[str, Any] = {
        "eps": eps,
        "alpha": alpha,
        "on": on,
        "limit": limit,
        "seed": seed,
        "deadline": Deadline(time_limit),
        "save_examples": save_examples,
        "search_dtype": search_dtype,
        "mode": mode,
    }
    folder = runs[0] if len(runs) == 1 else None
    request = None if elsewhere is None else elsewhere[1]
    with trusting(trust_code), evaluating_together(runs, request) as shows:
        terminal = Terminal(stderr=True, quiet=not shows)
        options["console"] = Console(terminal)
        try:
            if elsewhere is None:
                table = evaluate_runs(runs, attacks, which=which, **told, **options)
            else:
                found = load_foreign(*elsewhere)
                folder = str(found.folder.path)
                if format_ == "table" and shows:
                    Terminal().print(escape(found.said))
                table = table_of_file(elsewhere[0], evaluate_foreign(found, attacks, **options))
        except EvaluationStopped as stopped:
            if not (stopped.scores and shows):
                pass
            elif elsewhere is not None:
                _show(table_of_file(elsewhere[0], stopped.scores), folder, format_)
            elif len(runs) == 1 and which != "both":
                _show(table_of_run(runs[0], which, stopped.scores), folder, format_)
            raise stopped.interrupted() from None
    if not shows:
        return
    _show(table, folder, format_)
    if beside:
        asked: dict[str, Any] = {"eps": eps, "limit": limit, "seed": seed}
        with trusting(trust_code):
            if elsewhere is None:
                loaded = load_run(runs[0], which, **told, device=None).evaluated
                scores = evaluate_run(runs[0], attacks, which=which, **told, **options)
            else:
                loaded = (found.config, found.data, found.model)
                scores = evaluate_foreign(found, attacks, **options)
            show_beside(loaded, scores, beside, asked)


def _show(table: ScoreTable, folder: str | None, format_: str) -> None:
    """Print ``table``; ``folder`` keeps the results (None: each run its own)."""
    from fastadv.cli.score_table import FORMATS, meaning, terminal, title

    if format_ != "table":
        print(FORMATS[format_](table), end="")
        for sentence in table.unfinished:
            typer.echo(sentence, err=True)
        return
    out = Terminal()
    if table.attacks:
        out.print(title(table))
        out.print(terminal(table))
    for sentence in table.unfinished:
        out.print(escape(sentence))
    for file in table.examples:
        out.print(f"adversarial examples: {escape(printable(file))}")
    kept = "the evaluations.jsonl of each run"
    if folder is not None:
        kept = f"{escape(printable(folder))}/evaluations.jsonl"
    said = f"{table.said}; {meaning(table)}; kept in {kept}"
    if table.stored:
        said += f", evaluated before: {escape(', '.join(table.stored))}"
    out.print(said)
