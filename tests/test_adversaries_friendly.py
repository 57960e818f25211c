"""FAT's early stops against a loop over samples, and the noise of its steps."""

from __future__ import annotations

import pytest
import torch
from test_cost import counted_in_an_update
from tiny import EPS, assert_same, descend, sgd, tiny_batch, tiny_model, tiny_step
from tiny_capture import capture
from torch.nn import functional

from fastadv import kernels
from fastadv.algorithms.adversaries.friendly import NOISE

MODES = ["eager", "captured", pytest.param("compiled", marks=pytest.mark.slow)]


@pytest.mark.parametrize("mode", MODES)
def test_an_image_stops_after_tau_further_steps(mode: str) -> None:
    """tau is 0, 1 and 2 in epochs of one update."""
    model, other = tiny_model(), tiny_model()
    options = {"tau": "0@0,1@1,2@2", "steps": 4, "alpha": 0.02, "step_noise": 0.01}
    lengths = {"total_steps": 3, "steps_per_epoch": 1}
    given = "eager" if mode == "captured" else mode
    step = tiny_step(model, "fat", mode=given, **options, **lengths)
    step = capture(step) if mode == "captured" else step
    optimizer, ends = sgd(other), []
    for update in range(3):
        x, y, index, start = tiny_batch(seed=update)
        step(x, y, index, start=start)
        other.eval()
        drawn = kernels.noise_normal(
            index, (4, *x.shape[1:]), 0, update + NOISE.shift, NOISE.number, torch.float64
        )
        ended = []
        for row in range(len(y)):
            image, left, taken = x[row], update, 0
            point = (image + start[row].clamp(-EPS, EPS)).clamp(0, 1)
            for turn in range(4):
                point = point.detach().requires_grad_()
                logits = other(point[None])
                if logits.argmax() != y[row]:
                    if left == 0:
                        break
                    left -= 1
                loss = functional.cross_entropy(logits, y[row : row + 1])
                (slope,) = torch.autograd.grad(loss, point)
                moved = point.detach() + 0.02 * slope.sign() + 0.01 * drawn[row, turn]
                point = (image + (moved - image).clamp(-EPS, EPS)).clamp(0, 1)
                taken += 1
            ended.append(point.detach())
            ends.append(taken)
        other.train()
        descend(optimizer, functional.cross_entropy(other(torch.stack(ended)), y))
    assert len(set(ends)) > 2, "images end after different numbers of steps"
    assert_same(model, other)


def test_it_makes_the_passes_that_are_counted() -> None:
    seen, expected = counted_in_an_update("fat", restarts=2)
    assert seen == expected
