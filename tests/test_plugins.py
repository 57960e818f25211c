"""The example plugin: its formula, modes, resuming, passes. How plugins are found is in
``test_plugin_loading.py``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from every_recipe import call, step_of
from plugin_files import EXAMPLE, forgotten_after, lines_of_code, load
from test_cost import counted_in_an_update
from tiny import EPS, assert_same, climb, descend, sgd, tiny_batch, tiny_model, tiny_step, twin
from tiny_run import assert_same_run, run
from tiny_staged import staged_model
from torch.nn import functional

from fastadv.algorithms.resolution import resolve
from fastadv.errors import UserError


@pytest.fixture(autouse=True)
def _loaded() -> Iterator[None]:
    with forgotten_after():
        load()
        yield


def test_a_plugin_is_short_and_uses_public_names() -> None:
    text = EXAMPLE.read_text()
    assert lines_of_code(text) <= 40
    imported = [line.split()[1] for line in text.splitlines() if line.startswith(("from ", "imp"))]
    ours = {name for name in imported if name.startswith("fastadv")}
    assert ours <= {"fastadv", "fastadv.declared", "fastadv.algorithms.contract"}


def test_every_example_is_tested() -> None:
    assert list(EXAMPLE.parent.glob("*.py")) == [EXAMPLE]


def test_its_formula() -> None:
    model, other = tiny_model(), tiny_model()
    step = tiny_step(model, "pairing", steps=2, alpha=EPS / 2, pairing=2.0)
    optimizer = sgd(other)
    for update in range(3):
        x, y, index, start = tiny_batch(seed=update)
        step(x, y, index, start=start)
        loss = lambda logits, y=y: functional.cross_entropy(logits, y)  # noqa: E731
        x_adv = climb(other, x, start, loss, EPS / 2, 2, "eval")
        clean, attacked = other(x), other(x_adv)
        total = torch.zeros(())
        for i, label in enumerate(y.tolist()):
            own = -(attacked[i, label].exp() / attacked[i].exp().sum()).log()
            total = total + own + 2 * sum((attacked[i, k] - clean[i, k]) ** 2 for k in range(4))
        descend(optimizer, total / len(y))
    assert_same(model, other)


@pytest.mark.parametrize("mode", ["captured", "compiled"])
def test_every_mode_computes_the_same(mode: str) -> None:
    eager, other = run("pairing"), run("pairing", mode)
    assert_same_run(eager, other, tolerance=1e-9)
    if mode == "captured":
        assert other.step.internals.passes.recorded == 2  # the full batch and the short one
    else:
        assert other.compilations[0] >= 2
        assert sum(other.compilations[1:]) == 0


def test_a_resumed_run_is_bit_for_bit_the_same() -> None:
    step = step_of("pairing", staged_model())
    for update in range(2):
        call(step, update)
    other = step_of("pairing", twin(step.model))
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    for update in (2, 3):
        losses = [one_call["loss"] for one_call in (call(step, update), call(other, update))]
        assert torch.equal(*losses)
    assert_same(step.model, other.model, tolerance=0)


@pytest.mark.parametrize("options", [{}, {"weights": "awp"}, {"restarts": 2}])
def test_a_plugin_makes_the_passes_that_are_counted(options: dict[str, Any]) -> None:
    seen, expected = counted_in_an_update("pairing", **options)
    assert seen == expected


def test_a_plugins_refusals() -> None:
    with pytest.raises(UserError, match="the pairing is 0"):
        resolve("pairing", {"adversary": "none", "start": "none"})
