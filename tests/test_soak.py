"""Soak: memory, files and caches stay flat over many steps of the recipes that hold state."""

from __future__ import annotations

import contextvars
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from every_recipe import call, step_of
from soaking import soak, stateful
from tiny import tiny_batch
from tiny_staged import staged_model

from fastadv.benchmark.rows import append_rows, provenance
from fastadv.engine.model.compiled_forward import CompiledForward

ROWS = Path(__file__).parents[1] / "bench" / "results" / "soak.jsonl"
QUICK = (
    "apart",
    "te",
    *(pytest.param(m, marks=pytest.mark.slow) for m in ("atta-1", "swa", "free")),
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize("method", QUICK)
def test_a_hundred_steps_hold_nothing(method: str) -> None:
    found = soak(method, 100)
    assert found.is_flat(), found


def test_what_grows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.Tensor] = []
    step = type(step_of("fgsm", staged_model()))
    made = step.__call__

    def keeping(self: object, *given: object, **more: object) -> object:
        kept.append(torch.zeros(1))
        return made(self, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(step, "__call__", keeping)
    found = soak("fgsm", 20)
    assert found.tensors == 20
    assert not found.is_flat()


def test_calls_of_compiled_code_leave_nothing_in_the_context() -> None:
    """Every patch of torch's settings that is made leaves a variable there."""
    step = step_of("fgsm", staged_model(), "compiled", backend="eager")
    forward = CompiledForward("eager")
    x = tiny_batch(16)[0]

    def calls(count: int) -> int:
        for update in range(count):
            call(step, update)
            with forward.at_work():
                forward(step.model, x, None)
        return len(contextvars.copy_context())

    assert calls(3) == calls(5)
    assert forward.works


@pytest.mark.slow
def test_compiled_steps_are_not_compiled_again() -> None:
    for method in ("apart", "te"):
        found = soak(method, 100, "compiled")
        assert found.is_flat(), found


@pytest.mark.slow
def test_every_recipe_with_state() -> None:
    grown = [soak(method, 30) for method in stateful()]
    assert [found for found in grown if not found.is_flat()] == []


@pytest.mark.long
def test_two_thousand_steps_of_every_recipe_with_state() -> None:
    """A row for each recipe; the last one of a recipe counts."""
    facts = provenance(torch.device("cpu"))
    grown = []
    for method in stateful():
        found = soak(method, 2000)
        append_rows(ROWS, [facts | {"kind": "soak", "flat": found.is_flat()} | asdict(found)])
        grown.append(found)
    assert len(grown) > 20
    assert [found for found in grown if not found.is_flat()] == []


def test_the_last_rows_are_flat() -> None:
    """What the long form found of each recipe when it ran last."""
    if not ROWS.exists():
        pytest.skip("the long form has not been run (pytest -m long tests/test_soak.py)")
    last = {row["recipe"]: row["flat"] for row in map(json.loads, ROWS.read_text().splitlines())}
    assert len(last) > 20
    assert all(last.values()), last


def test_a_call_makes_no_reference_cycles_of_tensors() -> None:
    """Otherwise memory would wait for the garbage collector."""
    import gc

    step = step_of("apart", staged_model())
    for update in range(3):
        call(step, update)
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
        for update in range(5):
            call(step, update)
        after = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    finally:
        gc.enable()
    assert after == before
