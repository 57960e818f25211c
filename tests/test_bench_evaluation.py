"""Which programs ``bench/evaluation.py`` times."""

from __future__ import annotations

import argparse

import pytest
import torch
from bench_script import script

from fastadv.errors import UserError

pytest.importorskip("pyautoattack")


def programs(**given: object) -> list[str]:
    asked = {"search_dtypes": "float32,bf16", "modes": "auto", "attack": "none", "pgd": 5}
    found = script("evaluation").compared(argparse.Namespace(**asked | given))
    return [name for attack in found.values() for name in attack]


def test_programs_are_named_after_precision_and_mode() -> None:
    assert programs() == ["fastadv float32", "fastadv bf16", "torchattacks"]
    assert programs(attack="autoattack", pgd=None, modes="eager,compiled") == [
        "fastadv float32", "fastadv float32 compiled", "fastadv bf16", "fastadv bf16 compiled",
        "pyautoattack",
    ]  # fmt: skip
    with pytest.raises(UserError, match="auto and eager would have one name"):
        programs(modes="auto,eager")


def test_a_program_runs_in_its_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = script("evaluation")
    asked: list[object] = []

    def stop(*_: object, mode: str, **__: object) -> None:
        asked.append(mode)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "verdicts_of", stop)
    given = argparse.Namespace(search_dtypes="float32", modes="eager,compiled")
    images, labels = torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64)
    problem = bench.Problem(torch.nn.Flatten(), images, labels, "linf", 0.1, 1)
    for program in bench.own_programs("pgd-1", given).values():
        with pytest.raises(KeyboardInterrupt):
            program(problem)
    assert asked == ["eager", "compiled"]
