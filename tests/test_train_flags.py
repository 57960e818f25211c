"""The options of ``fastadv train`` change only on purpose."""

from __future__ import annotations

import difflib
from typing import get_args

import pytest
from train_flags import GOLDEN, REWRITE, train_flags

from fastadv.cli.flags import train_parameters
from fastadv.run.defaults import DEFAULTS


def difference() -> str:
    then = GOLDEN.read_text().splitlines()
    return "\n".join(difflib.unified_diff(then, train_flags(), "committed", "now", lineterm=""))


def test_the_options_are_the_committed_ones() -> None:
    assert not difference(), f"{difference()}\nIf this is meant: {REWRITE}"


def test_the_library_of_the_command_line_reads_flags_and_whole_numbers_only() -> None:
    """All else is read by ``declared.coerce``, which knows it and speaks of it in our words."""
    kinds = {get_args(each.annotation)[0] for each in train_parameters()}
    assert kinds == {bool | None, int | None, str | None}


def test_another_default_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEFAULTS, "momentum", 0.8)  # type: ignore[arg-type]
    assert "---momentum: float at least 0 and below 1 [0.9]" in difference()
    assert "+--momentum: float at least 0 and below 1 [0.8]" in difference()
