"""AWP and RWP as parts: the weights they select, the loss they use, where they start."""

from __future__ import annotations

import pytest
import torch
from tiny import assert_same, tiny_batch, tiny_model, tiny_step

from fastadv.algorithms.contract import Losses
from fastadv.algorithms.weights.awp import AWP
from fastadv.algorithms.weights.rwp import RWP


def test_a_matrix_of_another_name_is_not_perturbed() -> None:
    """csdongxian/AWP moves "weight" alone: no position embedding, no learned scale."""
    names = ["conv.weight", "position", "bn.weight", "linear.bias"]
    tensors = [torch.ones(2, 2), torch.ones(2, 2), torch.ones(2), torch.ones(2)]
    assert AWP().select(names, tensors) == [0]


def test_a_weight_frozen_between_two_updates_is_left_out_of_the_second() -> None:
    x, y, index, start = tiny_batch()
    model = tiny_model()
    step = tiny_step(model, "awp", steps=1)
    step(x, y, index, start=start)
    model.conv2.weight.requires_grad_(False)
    before = model.conv2.weight.clone()
    step(x, y, index, start=start)
    assert len(step.plan.weights.moved_by) == 2
    assert torch.equal(model.conv2.weight, before)


def test_rwp_of_all_samples_is_awp() -> None:
    """What the objective leaves out is not taken by the kernel for plain cross entropy either."""
    x, y, index, start = tiny_batch()
    models = [tiny_model(), tiny_model()]
    known = {"steps": 2, "alpha": 0.04, "gamma": 0.1, "leave_out_below": 1.5, "warmup_epochs": 0}
    rwp = {"weights": "rwp", "weight_steps": 1, "c_min": 100.0}
    awp = {"weights": "awp", "norm_scope": "global"}
    for model, options in zip(models, (rwp, awp), strict=True):
        tiny_step(model, **known, **options)(x, y, index, start=start)
    assert_same(*models)


def test_the_usual_size_of_the_perturbation_is_the_published_one() -> None:
    """Wu et al., 2020, and Yu et al., 2022: gamma 0.01 for adversarial training."""
    assert AWP().gamma == 0.01


@pytest.mark.parametrize(
    ("rwp_loss", "loss", "count"),
    [("total", (0.5 + 1.0) / 4, 2), ("adversarial", (3.0 + 4.0) / 4, 2)],
)
def test_rwp_selects_samples_by_the_chosen_loss(rwp_loss: str, loss: float, count: int) -> None:
    """l <= c_min, the border within; the mean is over the whole batch."""
    total, adversarial = torch.tensor([0.5, 1.0, 3.0, 4.0]), torch.tensor([2.0, 1.1, 1.0, 0.2])
    losses = Losses(total, adversarial, torch.zeros(4, 2), torch.zeros(4).long(), False)
    found, taken = RWP(c_min=1.0, rwp_loss=rwp_loss).reduce(losses)
    assert float(found) == pytest.approx(loss)
    assert int(taken) == count


def test_rwp_of_plain_losses_also_respects_the_range() -> None:
    logits = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 5.0]])
    y = torch.zeros(4).long()
    losses = torch.nn.functional.cross_entropy(logits, y, reduction="none")  # 0.69 0.05 1.31 5.0
    plain = Losses(losses, losses, logits, y, True)
    found, taken = RWP(c_min=1.7, loss_range=(0.5, 9.0)).reduce(plain)
    torch.testing.assert_close(found, (losses[0] + losses[2]) / 4)
    assert int(taken) == 2
