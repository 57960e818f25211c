"""Prints an evaluation beside the canonical AutoAttack's."""

from __future__ import annotations

import rich.table
from rich.markup import escape

from fastadv.run.beside import Beside
from fastadv.storage.printable import printable


def table_beside(found: Beside) -> rich.table.Table:
    """A row for each stage: robust accuracy after it, ours, the canonical one, the difference."""
    made = rich.table.Table(
        title=f"{escape(printable(found.attack))}: accuracy after each attack, "
        f"% of {found.n:,} images"
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


def said_beside(found: Beside) -> str:
    """On how many images the two differ, and what the canonical attacks took."""
    apart = found.only_ours + found.only_canonical
    images = "image" if apart == 1 else "images"
    return (
        f"the two differ on {apart:,} {images} ({found.only_ours:,} right under fastadv alone, "
        f"{found.only_canonical:,} under pyautoattack alone); pyautoattack took "
        f"{found.seconds:.1f} s"
    )
