"""Zero where it is allowed and leaves something without effect: a line says what it means."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from test_begun_with import SMALL
from tiny import tiny_batch, tiny_model, tiny_step

from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.without_effect import without_effect


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, []),
        ({"lr": 0}, ["lr 0: no update changes a weight"]),
        ({"eps": 0}, ["so fast trains on clean images and every accuracy is the clean one"]),
        ({"eps": 0, "method": "standard"}, ["moves no image, so every accuracy is the clean one"]),
    ],
)
def test_a_run_says_what_does_nothing(settings: dict[str, Any], said: list[str]) -> None:
    found = list(without_effect(resolve_run(RunRequest(**{"method": "fast"} | settings))))
    assert len(found) == len(said)
    for sentence, part in zip(found, said, strict=True):
        assert part in sentence


def test_the_commands_say_it_in_a_line(fastadv_command: Any) -> None:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    trained = fastadv_command("train", *words, "--lr=0", "--eps=0", "--alpha=0", "--out=run")
    assert trained.code == 0
    for said in ("lr 0: no update", "eps 0: an attack moves", "alpha 0: the attack takes no step"):
        assert trained.err.count(said) == 1, said
    judged = fastadv_command("evaluate", "run", "--attacks=fgsm", "--eps=0", "--limit=8")
    assert judged.code == 0
    assert "eps 0: an attack moves no image" in judged.err


def test_a_ramp_from_zero_is_no_zero() -> None:
    x, y, index, _ = tiny_batch()
    with pytest.warns(UserWarning, match="alpha 0: the attack takes no step"):
        tiny_step(tiny_model(), "pgd", steps=1, alpha=0.0)(x, y, index)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        later = {"alpha": "0@0,0.05@5", "steps_per_epoch": 4}
        tiny_step(tiny_model(), "pgd", steps=1, **later)(x, y, index)
