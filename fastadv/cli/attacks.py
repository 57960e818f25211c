"""The command ``attacks``: the attacks by name, their numbers, and what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import rich.table
from rich.markup import escape

from fastadv.printing.terminal import Terminal


def attacks() -> None:
    """List the attacks, for --attacks of evaluate and compare."""
    from fastadv.evaluation.attacks.names import WORDS, Objective

    out = Terminal()
    table = rich.table.Table(box=None, pad_edge=False)
    for head in ("attack", "numbers", "default"):
        table.add_column(head, no_wrap=True)
    table.add_column("what it computes", overflow="fold")
    for row in _rows():
        table.add_row(*map(escape, row))
    out.print(table)
    objectives = ", ".join(get_args(Objective))
    for sentence in (
        "",
        "Numbers follow the name and may be left out: apgd-ce, apgd-ce-50, apgd-ce-50-5. An image "
        "that stays robust takes their product in passes with a gradient, each about three "
        "forward passes; square: without gradients; fab and fab-t: a forward pass more for each.",
        f"pgd-OBJECTIVE, or pgd-OBJECTIVE-20, follows another loss: {objectives}.",
        "Words behind the numbers of pgd and cw are forms of released code; cw-margin always "
        "stops, and takes largest:",
        *(f"- {word}: {changes}." for word, changes in WORDS.items()),
        "Names with + between them are a cascade of your own: apgd-ce+square. Each search takes "
        "the images that those before it did not fool.",
    ):
        out.print(escape(sentence))


def _rows() -> Iterator[tuple[str, str, str, str]]:
    from fastadv.evaluation.attacks.names import OTHERS
    from fastadv.evaluation.search.catalogue import CASCADES, REPEATS, SEARCHES

    for name, (numbers, summary) in OTHERS.items():
        yield name, numbers, "", summary
    for name, search in SEARCHES.items():
        numbers, usual = "", ""
        if search.takes_numbers:
            numbers = "-".join(search.numbers)
            usual = f"{search.default_steps}-{search.default_segments}"
        yield name, numbers, usual, search.summary
    for name, parts in CASCADES.items():
        summary = f"the cascade {parts.replace('+', ' + ')}"
        if name in REPEATS:
            summary += f", gradients averaged over {REPEATS[name]} passes: for random networks"
        yield name, "", "", summary
