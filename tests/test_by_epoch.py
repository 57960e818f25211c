"""Values that change with the epoch: read, checked, written down, and followed by a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastadv import Phases, Ramp, UserError
from fastadv.by_epoch import read
from fastadv.declared import ChangingNonNegative, ChangingPasses, coerce
from fastadv.run.config_file import from_bytes, to_toml
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run, resolve_stored


def test_a_ramp_is_linear_and_stays_at_its_end() -> None:
    ramp = Ramp(0.0, 8.0, epochs=4)
    assert [ramp.at(epoch) for epoch in (0, 0.5, 1, 3.99, 4, 100)] == [0, 1, 2, 7.98, 8, 8]
    falling = Ramp(4.0, 1.0, epochs=3)
    assert [falling.at(epoch) for epoch in (0, 1, 2, 3)] == [4, 3, 2, 1]


def test_phases_hold_from_their_epoch_on() -> None:
    phases = Phases({30: 5, 0: 2, 60.5: 10})
    assert [phases.at(epoch) for epoch in (0, 29.9, 30, 60, 60.5, 1e6)] == [2, 2, 5, 5, 10, 10]


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("0..8/255@15", ChangingNonNegative, Ramp(0.0, 8 / 255, 15.0)),
        (" 1/255 .. 0.5 @ 2.5 ", ChangingNonNegative | None, Ramp(1 / 255, 0.5, 2.5)),
        ("2@0,5@30,10@60", ChangingPasses, Phases({0: 2, 30: 5, 60: 10})),
        ("2/255@0, 1/255@10", ChangingNonNegative | None, Phases({0: 2 / 255, 10: 1 / 255})),
        ("8/255", ChangingNonNegative, 8 / 255),
        (7, ChangingPasses, 7),
        (Phases({0: 3}), ChangingPasses, Phases({0: 3})),
    ],
)
def test_what_is_read(text: Any, hint: Any, value: Any) -> None:
    found = coerce("steps", text, hint)
    assert found == value
    assert coerce("steps", str(found), hint) == value  # as a config.toml holds it


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2@", "steps is a number, a ramp"),
        ("@3", "steps is a number, a ramp"),
        ("1..2@", "steps is a number, a ramp"),
        ("2@5,3@10", "begin with epoch 0.* 2@0,5@30 as text"),
        ("2@0,3@0", "same epoch"),
        ("0@0,3@5", "at least 1"),
        ("2.5@0", "whole number"),
        ("1..3@4", "take phases"),
        ("x@0", "number"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        coerce("steps", text, ChangingPasses)


def test_a_ramp_takes_time_and_stays_in_range() -> None:
    with pytest.raises(UserError, match="more than 0 epochs"):
        Ramp(0.0, 1.0, epochs=0)
    with pytest.raises(UserError, match="at least 0"):
        coerce("alpha", "-1..2@3", ChangingNonNegative)
    with pytest.raises(UserError, match=r"epoch -> value, such as .*, not \[1, 2\]"):
        Phases([1, 2])  # type: ignore[list-item]
    assert read("alpha", "0.5") is None


def test_a_run_keeps_them_in_its_configuration(tmp_path: Path) -> None:
    options = {"steps": "1@0,3@1", "alpha": "0..4/255@2"}
    config = resolve_run(RunRequest(method="pgd", eps_warmup=1.5, options=options))
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    stored = resolve_stored(from_bytes(path.read_bytes(), path))
    assert stored.options["steps"] == Phases({0: 1, 1: 3})
    assert stored.options["alpha"] == Ramp(0.0, 4 / 255, 2.0)
    assert stored.eps_warmup == 1.5
    assert to_toml(stored) == to_toml(config)


def test_a_run_follows_them(fastadv_command: Callable[..., Any]) -> None:
    words = ("--method", "pgd", "--steps", "1@0,2@1", "--eps-warmup", "2", "--epochs", "2",
             "--width", "2", "--limit", "64", "--test-attacks", "clean", "--select-attack", "clean",
             "--test-limit", "16")  # fmt: skip
    found = fastadv_command("train", *words, "--out", "run")
    assert found.code == 0, found.err
    assert "eps 0.2 (from 0 over 2 epochs)" in " ".join(found.out.split())
    wrong = fastadv_command("train", "--method", "pgd", "--steps", "1@0,x@1")
    assert wrong.code == 2
    assert "each value of --steps (value@epoch) must be a whole number" in wrong.err
