"""The public surface of a step: its attributes, its repr, its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import flat_step, sgd, tiny_batch, tiny_model, tiny_step

import fastadv
from fastadv.algorithms.objectives.ce import CrossEntropy
from fastadv.algorithms.resolution import resolve
from fastadv.errors import UserError
from fastadv.threat import Threat
from fastadv.training.settings import Execution, Precision, RunLength

PUBLIC = {
    *("model", "optimizer", "plan", "threat", "mode", "state", "internals"),
    *("calls", "epoch", "updates_per_batch", "rank_local_state"),
    *("set_epoch", "resolve_mode", "check", "healthy", "advice", "evaluation_weights"),
    *("state_dict", "load_state_dict"),
}


def test_nothing_else_is_public() -> None:
    step = tiny_step(tiny_model(), "pgd", steps=1)
    x, y, index, _ = tiny_batch()
    step(x, y, index)
    assert {name for name in dir(step) if not name.startswith("_")} == PUBLIC


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "the model's precision"),
        ({"amp": True}, "bf16"),
        ({"amp": True, "attack_dtype": "fp32"}, "bf16, attack fp32"),
    ],
)
def test_the_repr_of_a_step_tells_method_threat_precision_and_mode(
    settings: dict[str, object], words: str
) -> None:
    model = tiny_model().float()
    plan, threat = resolve("trades", {}), Threat("l2", 0.5)
    step = flat_step(model, sgd(model), plan, threat, mode="eager", **settings)
    assert repr(step) == f"<fastadv.Step trades: l2, eps 0.5, {words}, eager>"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"criterio": torch.nn.MSELoss(reduction="none")}, "did you mean 'criterion'?"),
        ({"total_step": 5}, "did you mean 'total_steps'?"),
        ({"objectiv": "ce"}, "did you mean 'objective'?"),
        ({"blocks": ("layer1.0.conv1",)}, "blocks= is for adversaries .* omit it with pgd"),
        ({"threat": "l2"}, "threat must be a fastadv.Threat"),
        (
            {"objective": CrossEntropy},
            r"takes a part and not its class: write objective=CrossEntropy\(...\)",
        ),
        (
            {"regularizer": CrossEntropy()},
            "derived from Regularizer, and CrossEntropy is one of the slot objective",
        ),
    ],
)
def test_a_wrong_argument_is_refused_in_one_sentence(given: dict[str, Any], said: str) -> None:
    model = tiny_model()
    with pytest.raises(UserError, match=said) as refused:
        fastadv.step(model, sgd(model), "pgd", **given)
    assert str(refused.value).count(". ") == 0


@pytest.mark.parametrize("update", ["no", None, 0])
def test_update_is_a_bool(update: Any) -> None:
    x, y, index, _ = tiny_batch()
    with pytest.raises(UserError, match="update is True or False"):
        tiny_step(tiny_model(), "pgd", steps=1)(x, y, index, update=update)


def test_two_parts_cannot_have_a_state_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    step = tiny_step(tiny_model(), "pgd", steps=1)
    for part in (step.plan.objective, step.plan.target):
        monkeypatch.setitem(part.state, "rows", torch.zeros(2))
    with pytest.raises(UserError, match="Two parts of 'pgd' have a state called 'rows'"):
        step(*tiny_batch()[:3])


def test_the_averages_of_the_weights_are_also_states_with_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are allocated after the states of the parts."""
    step = tiny_step(tiny_model(), "pgd", steps=1, averaging="ema")
    monkeypatch.setitem(step.plan.target.state, "average.linear.bias", torch.zeros(2))
    with pytest.raises(UserError, match=r"have a state called 'average\.linear\.bias'"):
        step(*tiny_batch()[:3])


def test_every_part_of_one_step_has_its_own_names() -> None:
    """As many names in ``state`` as the parts have together."""
    step = tiny_step(
        tiny_model(),
        "atta-3",
        target="self-adaptive",
        sat_start=0,
        total_steps=4,
        steps_per_epoch=2,
    )
    step(*tiny_batch()[:3])
    assert len(step.state) == sum(len(part.state) for part in step.plan.parts.values()) > 1


def test_precision_refuses_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="amp is True or False"):
        Precision(amp="fp16")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="pass amp=True"):
        Precision(amp_dtype="fp16")


def test_a_length_counts_in_updates() -> None:
    length = RunLength(num_samples=10, total_steps=6, steps_per_epoch=3).in_updates(4)
    assert (length.num_samples, length.total_steps, length.steps_per_epoch) == (10, 24, 12)
    assert RunLength().in_updates(4) == RunLength()
    with pytest.raises(UserError, match="total_steps"):
        RunLength(total_steps=-1)


def test_only_a_requested_mode_is_strict() -> None:
    assert Execution("captured").is_strict
    assert not Execution().is_strict
    assert Execution(strict=True).is_strict
