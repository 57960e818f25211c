"""The lines about the epochs of a run, as a table of at most 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastadv.run.short_words import clock, end_of

WIDTH = 80
AGAIN = 20  # rows after which the heads are repeated


class _Column(NamedTuple):
    """``group`` is the head above the heads of neighbouring columns."""

    head: str
    width: int
    group: str = ""


class EpochTable:
    """Rows of the lines of ``metrics.jsonl``; accuracies are percentages, as there.

    ``sets``: name of a set that is evaluated -> its number of images; ``attack`` is the one of
    the best epoch. ``left``: rows have the time that is left, where there is room for it.
    """

    def __init__(self, epochs: int, sets: Mapping[str, int], attack: str) -> None:
        self.epochs, self._sets = epochs, sets
        self._names = [*dict.fromkeys(["clean", attack])]
        self._rows = 0
        self._gap, self._columns = next(
            ((gap, columns) for gap in (2, 1) if _width(columns := self._made(gap), gap) <= WIDTH),
            (1, self._made(1)),
        )
        more = [*self._columns, _Column("left", 8)]
        self.has_left = _width(more, self._gap) <= WIDTH
        if self.has_left:
            self._columns = more

    def _made(self, gap: int) -> list[_Column]:
        """All columns but the last, with ``gap`` spaces between two."""
        digits = len(str(self.epochs))
        columns = [_Column("epoch", max(5, 2 * digits + 1)), _Column("loss", 7), _Column("lr", 7)]
        columns.append(_Column("%", 5, "train"))
        for name, images in self._sets.items():
            group = f"{name}, % of {images:,}"
            heads = [end_of(each, 12) for each in self._names]
            widths = [max(5, len(head)) for head in heads]
            widths[0] += max(0, len(group) - sum(widths) - gap * (len(widths) - 1))
            columns += [_Column(h, w, group) for h, w in zip(heads, widths, strict=True)]
        return [*columns, _Column("time", 8)]

    def heads(self) -> list[str]:
        """The two lines above the rows, where they are due: before the first row, and again."""
        if self._rows % AGAIN:
            return []
        between, groups = " " * self._gap, list[tuple[str, int]]()
        for column in self._columns:
            if column.group and groups and groups[-1][0] == column.group:
                groups[-1] = (column.group, groups[-1][1] + self._gap + column.width)
            else:
                groups.append((column.group, column.width))
        above = between.join(f"{group:>{width}}" for group, width in groups)
        below = between.join(f"{column.head:>{column.width}}" for column in self._columns)
        return [above.rstrip(), below]

    def row(self, line: Mapping[str, Any], seconds: float, left: float | None) -> str:
        """One epoch: ``line`` of metrics.jsonl, and the seconds of the run so far and left."""
        self._rows += 1
        cells = [f"{line['epoch']}/{self.epochs}", _number(line["loss"]), _rate(line["lr"])]
        cells.append(_percent(line.get("train_accuracy_percent")))
        for name in self._sets:
            cells += [_percent(line.get(f"{name}_{each}_percent")) for each in self._names]
        cells.append(clock(seconds))
        cells += [clock(left)] * self.has_left
        pairs, between = zip(cells, self._columns, strict=True), " " * self._gap
        return between.join(f"{cell:>{column.width}}" for cell, column in pairs).rstrip()


def _width(columns: Sequence[_Column], gap: int) -> int:
    return sum(column.width for column in columns) + gap * (len(columns) - 1)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _number(value: float) -> str:
    """At most seven characters."""
    short = f"{value:.4f}"
    return short if len(short) <= 7 else f"{value:.1e}"


def _rate(value: float) -> str:
    return f"{value:.4f}" if value == 0 or 0.001 <= value < 100 else f"{value:.1e}"
