"""How a sentence shows the names and the values of settings."""

from __future__ import annotations

import pytest

from fastadv.run.spelling import as_typed, in_dashes, shown


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "not set"), (0.1, "0.1"), (1.0, "1"), (8 / 255, repr(8 / 255)), (True, "True"),
        ((0.5, 0.75), "0.5,0.75"), (("best", "last"), "best,last"), ("a\nb", "a\\nb"), (7, "7"),
    ],
)  # fmt: skip
def test_values(value: object, said: str) -> None:
    assert shown(value) == said


def test_values_that_differ_look_different() -> None:
    assert shown(0.1) != shown(0.1 + 1e-12)


def test_options_as_they_are_typed() -> None:
    typed = [as_typed("flip", False), as_typed("flip", True), as_typed("batch_size", 64)]
    assert typed == ["--no-flip", "--flip", "--batch-size 64"]
    assert in_dashes("batch_size") == "batch-size"
