"""``evaluate --reference``: an evaluation beside that of the canonical AutoAttack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import rich.table
import typer
from rich.markup import escape

from fastadv.errors import UserError, warn
from fastadv.printing.terminal import Terminal
from fastadv.storage.printable import printable

if TYPE_CHECKING:
    from fastadv.evaluation.scores import Scores
    from fastadv.run.beside import Beside

Reference = Annotated[
    bool, typer.Option("--reference", help="run the canonical AutoAttack beside ours")
]


def attacks_beside(attacks: str, runs: list[str], which: str) -> list[str]:
    """Those of ``attacks`` that the canonical package runs as well. Raises ``UserError`` if there
    is none, or if several networks are asked for."""
    from fastadv.run.beside import referenced

    if len(runs) > 1 or which == "both":
        raise UserError(
            "--reference compares one network: name one run, with --which best or --which last."
        )
    return referenced(attacks)


def show_beside(loaded: Any, scores: Scores, attacks: list[str], asked: dict[str, Any]) -> None:
    """Print what the canonical package finds on the network ``loaded`` beside ``scores``, and its
    warnings. ``asked``: eps, limit and seed."""
    from fastadv.run.beside import beside_canonical

    out = Terminal()
    for one in beside_canonical(loaded, scores, attacks, **asked):
        out.print(_table(one))
        out.print(_sentence(one))
        for remark in one.remarks:
            warn(f"pyautoattack says: {remark}")


def _table(found: Beside) -> rich.table.Table:
    """A row for each stage: robust accuracy after it, ours, the canonical one, the difference."""
    made = rich.table.Table(
        title=f"{escape(printable(found.attack))}: accuracy, % of {found.n:,} images"
    )
    made.add_column("after")
    for head in ("fastadv", "pyautoattack", "difference"):
        made.add_column(head, justify="right")
    for stage, ours, theirs in found.stages:
        cells = ["", ""]
        if theirs is not None:
            cells = [f"{100 * theirs:.2f}", f"{100 * (ours - theirs):+.2f}"]
        made.add_row(escape(printable(stage)), f"{100 * ours:.2f}", *cells)
    return made


def _sentence(found: Beside) -> str:
    """On how many images the two differ, and what the canonical attacks took."""
    apart = found.only_ours + found.only_canonical
    images = "image" if apart == 1 else "images"
    return (
        f"the two differ on {apart:,} {images} ({found.only_ours:,} right under fastadv alone, "
        f"{found.only_canonical:,} under pyautoattack alone); pyautoattack took "
        f"{found.seconds:.1f} s"
    )
