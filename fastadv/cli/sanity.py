"""``fastadv evaluate --sanity``: the report of the checks, and the exit code it ends with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from fastadv.errors import UserError
from fastadv.exit_codes import ExitCode
from fastadv.printing.terminal import Terminal
from fastadv.storage.printable import printable

if TYPE_CHECKING:
    from fastadv.evaluation.sanity.finding import Report
    from fastadv.run.request import RunRequest

Sanity = Annotated[
    bool,
    typer.Option(
        "--sanity",
        help="check for masked gradients, with attacks of its own; exit code "
        f"{ExitCode.DOUBT} if any",
    ),
]
Other = Annotated[
    str | None,
    typer.Option(help="with --sanity: a run whose adversarial images are tried as well"),
]
_COLOURS = {True: "green", False: "red", None: "yellow"}


def check(
    runs: Sequence[str],
    elsewhere: tuple[str, RunRequest] | None,
    which: str,
    told: Mapping[str, Any],
    **options: Any,
) -> ExitCode:
    """Check each of ``runs``, whose data are where the user has ``told``, or the network from
    ``elsewhere``, and show the reports; returns the exit code: ``DOUBT`` if a check failed, else
    ``DONE``. Of several processes the first does it, and all return its code."""
    from fastadv.run.together import by_the_first

    passed = by_the_first(lambda: _check(runs, elsewhere, which, told, **options))
    return ExitCode.DONE if passed else ExitCode.DOUBT


def _check(
    runs: Sequence[str],
    elsewhere: tuple[str, RunRequest] | None,
    which: str,
    told: Mapping[str, Any],
    **options: Any,
) -> bool:
    """Check and show; returns whether all checks passed."""
    from fastadv.run.console import Console
    from fastadv.run.sanity import check_loaded

    console = Console(Terminal(stderr=True))
    passed = True
    for title, loaded, folder, weights in _networks(runs, elsewhere, which, told):
        report = check_loaded(loaded, folder, weights, **options, console=console)
        _show(title, str(folder.path), report)
        passed = passed and report.passed
    return passed


def require_alone(flags: Mapping[str, object]) -> None:
    """Raise ``UserError`` if one of the ``flags`` was given, which a check does not follow."""
    given = [flag for flag, value in flags.items() if value]
    if given:
        raise UserError(f"--sanity has attacks and a report of its own: omit {', '.join(given)}.")


def _networks(
    runs: Sequence[str],
    elsewhere: tuple[str, RunRequest] | None,
    which: str,
    told: Mapping[str, Any],
) -> Iterator[tuple[str, Any, Any, str]]:
    from fastadv.run.foreign import load_foreign, make_folder
    from fastadv.run.loaded import load_run
    from fastadv.run.which import one_named

    if elsewhere is not None:
        found = load_foreign(*elsewhere)
        make_folder(found)
        yield elsewhere[0], (found.config, found.data, found.model), found.folder, "weights"
        return
    for run in runs:
        weights = f"{one_named(which)} weights"
        loaded = load_run(run, which, **told, device=None)
        yield f"{run}, {weights}", loaded.evaluated, loaded.folder, weights


def _show(title: str, folder: str, report: Report) -> None:
    out = Terminal()
    out.print(escape(f"{printable(title)}: {report.n} test images"))
    for finding in report.findings:
        out.print(f"[{_COLOURS[finding.passed]}]{escape(finding.word):7}[/] {escape(finding.text)}")
    out.print(f"[{_COLOURS[report.passed]}]{escape(report.verdict())}[/]")
    out.print(escape(f"kept in {printable(folder)}/evaluations.jsonl"))
