"""The help of ``fastadv train``: the common options, or all.

The common screen is kept in ``train_help.txt``, so that it is shown without importing torch.
``python -m fastadv.cli.train_help`` writes it and ``completion.json`` anew; tests compare both
with the options.
"""

from __future__ import annotations

from pathlib import Path

from fastadv.cli import completion
from fastadv.cli.flags import common_groups, groups
from fastadv.cli.help_screen import page
from fastadv.printing.layout import page_columns

STORED = Path(__file__).with_name("train_help.txt")
COLUMNS = 80  # of the stored screen


def full(method: str | None = None, variant: str | None = None) -> str:
    """Every option; with ``method`` the run's settings and the options of that method's parts."""
    return page(groups(method, variant), page_columns())


def common() -> str:
    """The common options, as ``STORED`` keeps them."""
    return page(common_groups(), COLUMNS)


if __name__ == "__main__":
    from fastadv.cli.stored_completion import content

    STORED.write_text(common(), encoding="utf-8")
    completion.STORED.write_text(content(), encoding="utf-8")
