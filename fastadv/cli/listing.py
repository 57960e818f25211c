"""What ``fastadv methods`` prints: one line per method, grouped by the paper it comes from."""

from __future__ import annotations

import re

from fastadv.algorithms.recipe import Recipe
from fastadv.algorithms.recipes.table import METHODS
from fastadv.printing.layout import columns

# Below this the accuracies leave no room for what a method does.
NARROW = 72

_AUTHORS = re.compile(r"[^;,]+ et al\. [0-9]{4}")
_ACCURACY = re.compile(r"([0-9.]+)(?: / [0-9.]+)?(?: \([^)]*\))? (A?PGD-[0-9]+|AutoAttack)")


def listing(width: int | None = None) -> str:
    """The methods as text whose lines have at most ``width`` characters (None: as many as the
    terminal has, or as are needed where there is none)."""
    if width is None:
        width = columns()
    groups: dict[str, list[str]] = {}
    for name, row in METHODS.items():
        groups.setdefault(paper(row), []).append(name)
    left = max(map(len, METHODS)) + 2
    right = max(len(reported(row)) for row in METHODS.values()) + 1

    def line(mark: str, row: Recipe) -> str:
        cells = mark.ljust(left)
        return cells + (reported(row).ljust(right) if width >= NARROW else "") + row.summary

    lines = ["Reported: robust test accuracy in %, of the best epoch where there are two."]
    for title, names in groups.items():
        lines += ["", title, *(line(f" {name}", METHODS[name]) for name in names)]
    for title, forms in variants().items():
        lines += ["", title, *(line(f"  {name}", row) for name, row in forms.items())]
    lines += ["", "`fastadv methods NAME` shows everything about one method."]
    return "\n".join(_cut(line, width) for line in lines)


def variants() -> dict[str, dict[str, Recipe]]:
    """Title of a group -> name of a method -> its form there, for all forms with an accuracy of
    their own."""
    found: dict[str, dict[str, Recipe]] = {}
    for name, row in METHODS.items():
        for form in row.variants:
            own = row.of_variant(form)
            if reported(own):
                found.setdefault(f"{paper(own)}: add --variant {form}", {})[name] = own
    return found


def paper(row: Recipe) -> str:
    """The paper a method comes from: the first that its source cites by authors and year, else
    the first by its short name."""
    authors = _AUTHORS.search(row.source)
    if authors:
        return authors[0].strip()
    last = row.source.rpartition(";")[2] if row.source.startswith("every") else row.source
    return last.partition(",")[0].strip()


def reported(row: Recipe) -> str:
    """The robust accuracy that the source reports first, such as "52.79 PGD-20"; "" for none."""
    found = _ACCURACY.search(row.reported)
    return f"{found[1]} {found[2].replace('AutoAttack', 'AA')}" if found else ""


def _cut(line: str, width: int) -> str:
    """``line`` without spaces at its end; what is too long ends in "..." after a whole word."""
    line = line.rstrip()
    if len(line) <= width:
        return line
    return line[: width - 3].rsplit(" ", 1)[0].rstrip(" ,") + "..."
