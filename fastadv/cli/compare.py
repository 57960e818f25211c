"""The command ``compare``: are the accuracies of two networks different?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from fastadv.cli import completion
from fastadv.cli.judging_words import require_words
from fastadv.cli.shared_options import (
    Attacks,
    Data,
    DataRoot,
    Mode,
    On,
    Plugin,
    SearchDtype,
    TrustCode,
)
from fastadv.printing.terminal import Terminal
from fastadv.storage.printable import printable
from fastadv.storage.trust import trusting

if TYPE_CHECKING:
    from fastadv.run.pairs import RunPair


def compare(
    run_a: Annotated[str, typer.Argument(help="a run folder")],
    run_b: Annotated[str, typer.Argument(help="another run folder")],
    attacks: Attacks = "clean,pgd-20",
    which: Annotated[
        str,
        typer.Option(
            help="best or last weights, both, or a kept epoch's: 10",
            autocompletion=completion.of("--which"),
        ),
    ] = "best",
    eps: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="radius, if not the runs'")
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(metavar="NUMBER", help="step of pgd and cw, in pixels [the runs', eps/4]"),
    ] = None,
    on: On = "test",
    limit: Annotated[int | None, typer.Option(help="compare on this many images only")] = None,
    seed: Annotated[int, typer.Option(help="seed of the attacks")] = 0,
    search_dtype: SearchDtype = "float32",
    mode: Mode = "auto",
    data: Data = None,
    data_root: DataRoot = None,
    trust_code: TrustCode = False,
    plugin: Plugin = None,
) -> None:
    """Compare two runs on the same images, one by one: the difference of their accuracies, its
    95 % interval, and whether it can be told from chance. The verdicts on the images are kept in
    the run folders."""
    require_words(which=which, on=on, search_dtype=search_dtype, mode=mode)
    from fastadv.run.console import Console
    from fastadv.run.eval_pass import EvaluationStopped
    from fastadv.run.pairs import compare_runs
    from fastadv.run.together import evaluating_together

    options: dict[str, Any] = {"which": which, "eps": eps, "alpha": alpha, "on": on}
    options |= {"limit": limit, "seed": seed, "search_dtype": search_dtype, "mode": mode}
    options |= {"data": data, "data_root": data_root}
    told = False
    with trusting(trust_code), evaluating_together([run_a], None) as shows:
        terminal = Terminal(stderr=True, quiet=not shows)
        options["console"] = Console(terminal)
        try:
            for pair in compare_runs(run_a, run_b, attacks, **options):
                if shows:
                    _show(pair, printable(run_a), printable(run_b))
                told |= pair.paired.is_told
        except EvaluationStopped as stopped:
            raise stopped.interrupted() from None
    if told and shows:
        Terminal().print(
            "A difference of these two networks. Whether their methods differ, several seeds of "
            "each tell: fastadv evaluate RUN..."
        )


def _show(pair: RunPair, one: str, other: str) -> None:
    paired, facts = pair.paired, pair.first.facts
    a, b = (100 * verdicts.accuracy for verdicts in (pair.first, pair.second))
    images = facts["evaluated_on"]
    on = "" if images == "test images" else f"{images}, "
    out = Terminal()
    out.print(
        f"[bold]{escape(pair.attack)}[/], {pair.which} weights, {on}{facts['norm']} eps "
        f"{facts['eps']:.4g}: {escape(one)} {a:.2f} %, {escape(other)} {b:.2f} %; only the first "
        f"is right on {paired.first:,} images, only the second on {paired.second:,}"
    )
    out.print(escape(paired.sentence(one, other)))
