"""How the help of ``fastadv train`` is laid out: rows in groups, as plain text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fastadv.printing.layout import filled

LEFT = 25  # columns of the flags; the meaning of a longer flag begins on the next line

EXAMPLES = """\
Usage: fastadv train [OPTIONS]

  fastadv train                                      APART on digits
  fastadv train --method pgd --data cifar10 --download --amp
  fastadv train --method trades --beta 3 --eps 4/255
  fastadv train --method fast --weights awp          swap a part of the method
  fastadv train --config run.toml --dry-run          what it does and takes
  fastadv train --resume runs/apart-digits           continue an interrupted run
"""

MORE = """
[preset]: what the method and the data set usually take. All options:
--help-all; those of one method: --method NAME --help.
"""


class Row(NamedTuple):
    """One option: its flag with the type, what it means, its choices and default as words."""

    flag: str
    meaning: str
    allowed: str = ""
    default: str = ""

    def text(self, width: int, left: int = LEFT) -> str:
        """The row in lines of at most ``width`` columns; the meaning begins in column ``left``."""
        words = self.meaning + (f" ({self.allowed})" if self.allowed else "")
        words += f" [{self.default}]" if self.default else ""
        flag = f"  {self.flag}"
        first = flag.ljust(left) if len(flag) < left else flag + "\n" + " " * left
        return first + filled(words, max(width - left, 20)).replace("\n", "\n" + " " * left)


def laid_out(title: str, rows: Iterable[Row], width: int, left: int = LEFT) -> list[str]:
    """The lines of a group; none without rows."""
    found = [row.text(width, left) for row in rows]
    return [f"{title}:", *found] if found else []


def page(groups: Iterable[tuple[str, Iterable[Row]]], width: int) -> str:
    """Usage, examples and the rows of each group."""
    lines = [EXAMPLES]
    for title, rows in groups:
        lines += laid_out(title, rows, width)
    return "\n".join([*lines, MORE])
