"""Inputs and settings that a step refuses, in its first call and in any later one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import sgd, tiny_batch, tiny_model, tiny_step
from tiny_staged import staged_step
from torch import nn

import fastadv
from fastadv.errors import TrainingError, UserError
from fastadv.threat import Threat
from fastadv.training.calls import CHECK_EVERY_CALLS

x, y, index, _ = tiny_batch()
WRONG = {
    "a numpy array": ({"x": np.zeros((8, 3, 6, 6))}, r"x must be a torch\.Tensor, not ndarray"),
    "a list": ({"y": [0] * 8}, r"y must be a torch\.Tensor, not list"),
    "no image": ({"x": x[:0], "y": y[:0], "index": index[:0]}, "x holds no image"),
    "bytes": ({"x": (255 * x).byte()}, r"float images \(B,C,H,W\), not torch\.uint8"),
    "one image without a batch": ({"x": x[0]}, "float images"),
    "labels of another type": ({"y": y.float()}, "int64 labels"),
    "fewer labels": ({"y": y[:4]}, r"int64 labels of shape \(8,\)"),
    "an index of another type": ({"index": index.int()}, r"shape \(8,\), not torch\.int32 of"),
    "no index": ({"index": None}, "pass index="),
}


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_shapes_and_types_are_checked_at_every_call(wrong: str, later: bool) -> None:
    changes, sentence = WRONG[wrong]
    step = staged_step(tiny_model(), "atta-1", steps_per_epoch=2, num_samples=20, pad=0)
    given = {"x": x, "y": y, "index": index}
    if later:
        step(**given)
    with pytest.raises(UserError, match=sentence):
        step(**given | changes)


def test_a_loss_that_is_not_finite_ends_a_users_loop_soon() -> None:
    step = tiny_step(tiny_model(), "fgsm")
    step(x, y)
    step(torch.full_like(x, torch.nan), y)
    for _ in range(CHECK_EVERY_CALLS - 3):
        step(x, y)
    with pytest.raises(TrainingError, match="not finite at step 1; nothing was updated"):
        step(x, y)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"amp": "fp16"}, "amp is True or False, not 'fp16'"),
        ({"amp_dtype": "fp16"}, "also pass amp=True"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be above 0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be above 0"),
        ({"eps": 8}, r"did you mean 8/255\?"),
        ({"alpha": -0.01}, "alpha must be at least 0"),
    ],
)
def test_settings_that_would_be_ignored_or_harmful_are_refused(
    options: dict, sentence: str
) -> None:
    model = tiny_model()
    with pytest.raises(UserError, match=sentence):
        fastadv.step(model, sgd(model), "pgd", **options)


def test_the_optimizer_is_of_this_model() -> None:
    model = tiny_model()
    with pytest.raises(UserError, match="none of the model's parameters"):
        fastadv.step(model, sgd(tiny_model()), "pgd")
    with pytest.raises(UserError, match=r"must be a torch\.optim\.Optimizer"):
        fastadv.step(model, "sgd", "pgd")
    with pytest.raises(UserError, match="LBFGS"):
        fastadv.step(model, torch.optim.LBFGS(model.parameters()), "pgd")
    model.requires_grad_(False)
    with pytest.raises(UserError, match="are frozen"):
        fastadv.step(model, sgd(model), "pgd")


def test_a_model_returns_logits() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.inner(x), x

    model = Pair()
    with pytest.raises(UserError, match=r"logits \(B,classes\), not a tuple"):
        tiny_step(model, "pgd")(x, y)


def test_a_ball_larger_than_the_box_is_refused_as_a_mistake_of_units() -> None:
    assert Threat("linf", 1.0).eps == 1.0
    assert Threat("l2", 8.0).eps == 8.0
    assert Threat("linf", 8.0, 0.0, 255.0).eps == 8.0
    with pytest.raises(UserError, match="whole range of a pixel"):
        Threat("linf", 8.0)
