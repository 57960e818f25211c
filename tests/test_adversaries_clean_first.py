"""Standard training first, then PGD: against its loop, and in every mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import assert_same, climb, descend, sgd, tiny_batch, tiny_model, tiny_step, twin
from tiny_capture import capture
from torch.nn import functional

from fastadv.errors import UserError
from fastadv.training.training_step import Step

TIMES = {"total_steps": 6, "steps_per_epoch": 2}
OPTIONS: dict[str, Any] = {"adversary": "clean-first", "attack_start": 1, "steps": 2, "alpha": 0.04}
MODES = ["eager", "captured", pytest.param("compiled", marks=pytest.mark.slow)]


def step_of(model: torch.nn.Module, mode: str = "eager", **options: Any) -> Step:
    given = "eager" if mode == "captured" else mode
    step = tiny_step(model, mode=given, **OPTIONS | TIMES | options)
    return capture(step) if mode == "captured" else step


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("start", [1, 1 / 3])
def test_the_first_epochs_are_standard_training(start: float, mode: str) -> None:
    model, other = tiny_model(), tiny_model()
    step, optimizer = step_of(model, mode, attack_start=start), sgd(other)
    for update in range(5):
        x, y, index, begin = tiny_batch(seed=update)
        step(x, y, index, start=begin)
        if update >= 2:
            x = climb(
                other, x, begin, lambda z, y=y: functional.cross_entropy(z, y), 0.04, 2, "train"
            )
        descend(optimizer, functional.cross_entropy(other(x), y))
    assert_same(model, other)


def test_a_resumed_run_is_bit_for_bit_the_same() -> None:
    step = step_of(tiny_model())
    for update in range(2):
        x, y, index, _ = tiny_batch(seed=update)
        step(x, y, index)
    other = step_of(twin(step.model))
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    for each in (step, other):
        for update in (2, 3):
            x, y, index, _ = tiny_batch(seed=update)
            each(x, y, index)
    assert_same(step.model, other.model, tolerance=0)


def test_with_a_kl_attack_and_a_perturbation_of_the_weights() -> None:
    """Before the attack x' = x, so that the KL of TRADES is 0."""
    x, y, index, _ = tiny_batch()
    models = [tiny_model(), tiny_model()]
    for model, beta in zip(models, (6.0, 0.0), strict=True):
        step = step_of(model, objective="trades", attack_loss="kl", weights="awp", beta=beta)
        for _ in range(2):
            step(x, y, index)
    assert_same(*models)


def test_the_step_must_know_the_epoch() -> None:
    x, y, index, _ = tiny_batch()
    with pytest.raises(UserError, match="follows the epochs"):
        step_of(tiny_model(), total_steps=None, steps_per_epoch=None)(x, y, index)
    unknown = step_of(tiny_model(), attack_start=0.5, total_steps=None)
    with pytest.raises(UserError, match=r"attack_start=0\.5 is a fraction"):
        unknown(x, y, index)
