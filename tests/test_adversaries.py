"""Properties of several adversaries, in addition to the formula of each."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import EPS, tiny_batch, tiny_model, tiny_step, twin
from tiny_staged import gradient_at, recorded


def test_every_restart_starts_at_another_point() -> None:
    """With steps of length 0 a restart ends at its start: starts that are equal would show."""
    x, y, index, _ = tiny_batch()
    made = []
    for restarts in (1, 4):
        step = tiny_step(tiny_model(), "pgd", steps=1, alpha=0.0, restarts=restarts)
        found = recorded(step)
        step(x, y, index)
        made.append(found[0].x_adv)
    assert (made[0] != made[1]).flatten(1).any(1).any()


@pytest.mark.parametrize("method", ["atta-1", "fgsm-plus", "apart", "free"])
def test_a_batch_that_is_not_finite_changes_no_stored_state(method: str) -> None:
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), method, total_steps=9, steps_per_epoch=9)
    step(x, y, index)
    before = copy.deepcopy(step.state)
    broken = x.clone()
    broken[0, 0, 0, 0] = float("nan")  # only the first call looks at its images
    step(broken, y, index)
    step(x, y, index)  # nor does any batch after it
    assert step.state.keys() == before.keys()
    for name, value in step.state.items():
        assert torch.equal(value, before[name]), name


def test_fgsm_in_eval_mode_shares_no_pass_with_the_loss() -> None:
    """The gradient of the attack is the one at running statistics, whatever AdvLC forwards."""
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), "fgsm", regularizer="advlc", attack_bn="eval")
    model = twin(step.model).eval()
    made = recorded(step)
    step(x, y, index)
    expected = (x + EPS * gradient_at(model, x, y).sign()).clamp(0, 1)
    torch.testing.assert_close(made[0].x_adv, expected)


def test_no_step_of_n_fgsm_is_projected() -> None:
    x, y, index, start = tiny_batch()
    step = tiny_step(tiny_model(), "n-fgsm", alpha=5 * EPS)
    model = twin(step.model)
    made = recorded(step)
    step(x, y, index, start=start)
    noisy = (x + start).clamp(0, 1)
    expected = (noisy + 5 * EPS * gradient_at(model, noisy, y).sign()).clamp(0, 1)
    torch.testing.assert_close(made[0].x_adv, expected)


def test_choosing_the_worst_restart_changes_no_running_statistics() -> None:
    x, y, index, _ = tiny_batch()
    model = tiny_model()
    tiny_step(model, "pgd", steps=1, restarts=2, attack_bn="train")(x, y, index)
    assert int(model.bn1.num_batches_tracked) == 3  # one step of each restart, and the outer pass
