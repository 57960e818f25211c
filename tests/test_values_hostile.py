"""Faults in a user's model or loop that must neither train silently nor be misreported."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_values_watched import Backward, Odd, Rounded, batch, step_of, weights
from torch import Tensor, nn

import fastadv
from fastadv import TrainingError, UserError


class Forgiving(Odd):
    """Hides NaN in its images; the gradient of one of its passes is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.passes, self.bad = 0, -1

    def forward(self, x: Tensor) -> Tensor:
        factor = float("nan") if self.passes == self.bad else 1.0
        self.passes += 1
        return self.net(Backward.apply(torch.nan_to_num(x, 0.5), factor))


@pytest.mark.parametrize("bad", [0, 1])
def test_each_of_two_attacks_is_checked_if_the_network_hides_nan(bad: int) -> None:
    """LogitAlign also attacks a noisy copy of each image."""
    model = Forgiving()
    step = step_of(model, "fgsm", regularizer="logitalign")
    step(*batch(0))
    before, model.passes, model.bad = weights(model), 0, bad
    step(*batch(1))
    assert all(map(torch.equal, weights(model), before))
    with pytest.raises(TrainingError, match="gradient of the attack was not finite"):
        step.check()


@pytest.mark.parametrize("method", ["pgd", "fgsm-plus", "fast", "free", "n-fgsm", "atta-1"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_start_that_is_not_finite_is_refused_by_name(method: str, value: float) -> None:
    model = Odd()
    step = step_of(model, method)
    x, y, index = batch()
    step(x, y, index)
    before, start = weights(model), torch.zeros_like(x)
    start[0, 0, 0, 0] = value
    with pytest.raises(UserError, match="start holds values that are not finite"):
        step(x, y, index, start=start)
    assert all(map(torch.equal, weights(model), before))
    step.check()


def linear(norm: str) -> tuple[fastadv.Step, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    lengths = {"num_samples": 32, "steps_per_epoch": 1, "total_steps": 200}
    return fastadv.step(
        model, optimizer, "atta-1", norm=norm, mode="eager", reset_every=0, **lengths
    ), model


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("binary", [False, True])
def test_an_attack_that_has_converged_is_not_warned_about(norm: str, binary: bool) -> None:
    """Of a linear model the best perturbation is a corner, where ATTA's memory then stays."""
    step, _ = linear(norm)
    x, y, index = batch()
    x = x.round() if binary else x
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(99):
            step(x, y, index)
        step.check()


def test_an_attack_on_black_and_white_images_without_a_gradient_is_reported() -> None:
    step = step_of(Rounded(), "fgsm")
    x, y, index = batch()
    step(x.round(), y, index)
    with pytest.warns(UserWarning, match=r"moved no pixel of 8 of 8 images"):
        step.check()


def test_free_reports_that_its_gradient_is_zero() -> None:
    step = step_of(Rounded(), "free", replays=2)
    for number in range(3):
        step(*batch(number))
    with pytest.warns(UserWarning, match=r"moved no pixel of 48 of 48 images"):
        step.check()
    honest = step_of(Odd(), "free", replays=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(3):
            honest(*batch(number))
        honest.check()


def test_a_refused_batch_keeps_the_accumulated_gradient() -> None:
    found = []
    for refused in (False, True):
        model = Odd()
        step = step_of(model, "pgd")
        step(*batch(0))
        step(*batch(1), update=False)
        if refused:
            x, y, index = batch(5)
            with pytest.raises(UserError, match="no label is ignored"):
                step(x, torch.full_like(y, -100), index, update=False)
        step(*batch(2))
        found.append(weights(model))
    assert all(map(torch.equal, *found))


def test_a_bad_first_batch_of_an_epoch_undoes_the_reset_of_what_is_kept() -> None:
    model = Odd()
    step = step_of(model, "atta-1", reset_every=2, steps_per_epoch=1)
    step(*batch(0))
    before = {name: value.clone() for name, value in step.state.items()}
    model.factor = float("nan")
    step(*batch(1))
    assert not step.healthy()
    assert all(torch.equal(step.state[name], value) for name, value in before.items())


def test_a_nuclear_norm_of_nan_is_a_fault_of_the_run() -> None:
    model = Forgiving()
    step = step_of(model, "fgsm-n-advlc-nuclear")
    step(*batch(0))
    before, handle = weights(model), model.register_forward_hook(lambda m, a, z: z * float("nan"))
    step(*batch(1))
    handle.remove()
    assert all(map(torch.equal, weights(model), before))
    with pytest.raises(TrainingError, match="not finite"):
        step.check()
