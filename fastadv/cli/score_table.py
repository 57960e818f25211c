"""Prints scores of runs: a table for the terminal, and the tables of papers in Markdown, LaTeX and
CSV, with a row for each method and best, last and their difference for each attack."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator

import rich.table
from rich.markup import escape

from fastadv.errors import unknown
from fastadv.run.console import as_interval
from fastadv.run.several import MethodScores, Score, ScoreTable
from fastadv.storage.printable import printable

_DIFF = "diff"
Shown = Callable[[Score], tuple[str, ...]]
"""A score in one or more cells."""


def terminal(table: ScoreTable) -> rich.table.Table:
    """A table of at most 80 columns: a row for each attack and method. Where there is one method,
    what follows a number has its own column."""
    several = len(table.methods) > 1
    found = rich.table.Table()
    found.add_column("attack", no_wrap=True)
    if several:
        found.add_column("method", overflow="fold")
    for column in _columns(table):
        found.add_column(column, justify="right", no_wrap=True)
        if not several and column != _DIFF:
            found.add_column(_range_head(table), justify="right", no_wrap=True)
    for attack in table.attacks:
        for place, method in enumerate(table.methods):
            name = [escape(_name(method, table))] if several else []
            cells = _cells(method, attack, table, _plain if several else _split)
            last = place == len(table.methods) - 1
            shown = "" if place else escape(printable(attack))
            found.add_row(shown, *name, *cells, end_section=several and last)
    return found


def _range_head(table: ScoreTable) -> str:
    if len(table.which) > 1:
        return ""
    return "95 % interval" if len(table.methods[0].runs) == 1 else "std of seeds"


def title(table: ScoreTable) -> str:
    """What stands above the table, for a terminal."""
    said = _accuracy(table)
    return said if table.title is None else f"{escape(printable(table.title))}: {said}"


def markdown(table: ScoreTable) -> str:
    """A Markdown table and a line that says what is in it."""
    heads = [f"{attack} {column}".rstrip() for attack, column in _wide(table)]
    lines = [
        "| " + " | ".join(["method", *map(_in_markdown, heads)]) + " |",
        "|---" + "|---:" * len(heads) + "|",
    ]
    for method in table.methods:
        cells = [_in_markdown(_name(method, table)), *_every_cell(method, table, _plain)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _caption(table), ""])


def latex(table: ScoreTable) -> str:
    """A tabular of the package booktabs, with a comment that says what is in it."""
    columns = [column.capitalize() for column in _columns(table)]
    each, attacks = len(columns), table.attacks
    lines = [
        f"% {_caption(table)}",
        rf"\begin{{tabular}}{{l{'r' * (each * len(attacks))}}}",
        r"\toprule",
    ]
    if each > 1:
        spans = [rf"\multicolumn{{{each}}}{{c}}{{{_in_latex(attack)}}}" for attack in attacks]
        rules = [
            rf"\cmidrule(lr){{{2 + each * place}-{1 + each * (place + 1)}}}"
            for place in range(len(attacks))
        ]
        lines += [" & ".join(["", *spans]) + r" \\", " ".join(rules)]
        heads = columns * len(attacks)
    else:
        heads = [_in_latex(attack) for attack in attacks]
    lines += [" & ".join(["Method", *heads]) + r" \\", r"\midrule"]
    for method in table.methods:
        cells = [_in_latex(_name(method, table)), *_every_cell(method, table, _typeset)]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def as_csv(table: ScoreTable) -> str:
    """Numbers in %, one row for each method: for each attack and weights the accuracy or its mean,
    the standard deviation over seeds or the ends of the 95 % interval of a single run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = ["method", "seeds", "images"]
    for attack in table.attacks:
        for name in table.which:
            heads += [f"{attack} {name}{end}" for end in ("", " std", " low", " high")]
        if len(table.which) > 1:
            heads.append(f"{attack} {_DIFF}")
    writer.writerow(heads)
    for method in table.methods:
        writer.writerow([method.name, len(method.runs), table.n, *_numbers(method, table)])
    return text.getvalue()


def _numbers(method: MethodScores, table: ScoreTable) -> Iterator[str]:
    for attack in table.attacks:
        for name in table.which:
            score = method.scores[name][attack]
            for value in (score.mean, score.deviation, *(score.interval or (None, None))):
                yield "" if value is None else f"{100 * value:.4f}"
        if len(table.which) > 1:
            yield f"{100 * method.difference(attack):.4f}"


FORMATS: dict[str, Callable[[ScoreTable], str]] = {
    "markdown": markdown,
    "latex": latex,
    "csv": as_csv,
}
"""Format -> the function that writes it; beside them there is "table", for the terminal."""


def require_format(name: str) -> None:
    """Raise ``UserError`` for a format that is none."""
    if name not in ("table", *FORMATS):
        raise unknown("format", name, ("table", *FORMATS))


def _columns(table: ScoreTable) -> list[str]:
    """The columns of one attack."""
    return [*table.which, _DIFF] if len(table.which) > 1 else list(table.which)


def _wide(table: ScoreTable) -> list[tuple[str, str]]:
    """Attack and column of every column of a wide table."""
    columns = _columns(table) if len(table.which) > 1 else [""]
    return [(attack, column) for attack in table.attacks for column in columns]


def _cells(method: MethodScores, attack: str, table: ScoreTable, shown: Shown) -> list[str]:
    cells = [cell for name in table.which for cell in shown(method.scores[name][attack])]
    difference = [f"{100 * method.difference(attack):.2f}"] if len(table.which) > 1 else []
    return cells + difference


def _every_cell(method: MethodScores, table: ScoreTable, shown: Shown) -> list[str]:
    return [cell for attack in table.attacks for cell in _cells(method, attack, table, shown)]


def _split(score: Score) -> tuple[str, str]:
    number = f"{100 * score.mean:.2f}"
    if score.interval is None:
        return number, f"± {100 * (score.deviation or 0):.2f}"
    return number, as_interval(score.interval)


def _plain(score: Score) -> tuple[str]:
    number, after = _split(score)
    return (f"{number} {after}" if score.interval is None else f"{number} ({after})",)


def _typeset(score: Score) -> tuple[str]:
    number, after = _split(score)
    if score.interval is None:
        after = after.replace("±", r"$\pm$")
    else:
        after = rf"{{\scriptsize ({after.replace('-', '--')})}}"
    return (f"{number} {after}",)


def _name(method: MethodScores, table: ScoreTable) -> str:
    """The method, and its number of seeds in a table where some method has several."""
    if all(len(each.runs) == 1 for each in table.methods):
        return printable(method.name)
    seeds = len(method.runs)
    return f"{printable(method.name)} ({seeds} seed{'s' if seeds > 1 else ''})"


def meaning(table: ScoreTable) -> str:
    """What follows a number, in words."""
    single = any(len(method.runs) == 1 for method in table.methods)
    several = any(len(method.runs) > 1 for method in table.methods)
    deviation = ["after ± the standard deviation over seeds"] * several
    return ", ".join([*deviation, *["with the 95 % interval"] * single])


def _caption(table: ScoreTable) -> str:
    return f"{_accuracy(table).capitalize()}, {table.said}; {meaning(table)}."


def _accuracy(table: ScoreTable) -> str:
    return f"{table.on.removesuffix('images')}accuracy, % of {table.n:,} images"


def _in_markdown(text: str) -> str:
    return printable(text).replace("|", "\\|")


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def _in_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in printable(text))
