"""Calls that break off late or during copies, and optimizers with unusual state."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tiny import tiny_batch, tiny_model, tiny_step
from torch import nn

from fastadv.algorithms.contract import Batch
from fastadv.engine.model.precision import autocast
from fastadv.engine.optimizer.optimizer_copy import OptimizerCopy
from fastadv.training.grad_accumulators import with_fresh_grad_accumulators
from fastadv.training.training_step import Step


def _broken_off(step: Step, *batch: Any) -> None:
    """A call that raises after all its work is done."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(step._calls), "_close_epoch", Mock(side_effect=RuntimeError("late")))
        with pytest.raises(RuntimeError, match="late"):
            step(*batch)


def test_memory_that_is_full_while_copies_are_made_spoils_no_later_copy() -> None:
    x, y, index, _ = tiny_batch()
    model = tiny_model()
    step = tiny_step(model, "fgsm")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "cat", Mock(side_effect=torch.OutOfMemoryError("full")))
        with pytest.raises(torch.OutOfMemoryError):
            step(x, y, index)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    _broken_off(step, x, y, index)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_first_call_with_a_scaler_breaks_off_like_later_ones() -> None:
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), "fgsm", scaler=torch.amp.GradScaler("cpu"))
    _broken_off(step, x, y, index)
    assert int(step.internals.offset) == 0


def test_a_new_head_is_checked_again_after_a_call_that_broke_off() -> None:
    x, y, index, _ = tiny_batch()
    model = tiny_model()
    step = tiny_step(model, "fgsm")
    step(x, y, index)
    model.linear = nn.Linear(model.linear.in_features, 10).double()
    step.optimizer.add_param_group({"params": [*model.linear.parameters()]})
    _broken_off(step, x, y + 5, index)
    step(x, y + 5, index)


def test_optimizer_state_in_lists_is_restored() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight]["pairs"] = [torch.ones(2), {"deep": torch.ones(2)}]
    copy = OptimizerCopy(optimizer)
    copy.take()
    for kept in (weight.data, optimizer.state[weight]["pairs"][0]):
        kept += 1
    optimizer.state[weight]["pairs"][1]["deep"] += 1
    copy.put_back()
    pairs = optimizer.state[weight]["pairs"]
    assert weight.eq(0).all()
    assert pairs[0].eq(1).all()
    assert pairs[1]["deep"].eq(1).all()


def test_parameters_without_a_stream_learn_through_their_copies() -> None:
    """While the user's code holds a graph, fresh parameters replace the model's in a recording."""
    x, y, index, _ = tiny_batch()
    model = tiny_model().float()
    step = tiny_step(model, "fgsm", amp=True)
    step(x.float(), y, index)
    held = model(x.float()).sum()
    batch = Batch(x.float(), y, index, step.internals.offset, step.threat)
    with (
        autocast(step.internals.net.device, None),
        with_fresh_grad_accumulators(step.internals.update),
    ):
        results = step.internals.update.compute_gradients(batch)
    step.internals.net.copies.invalidate()
    assert held.requires_grad
    assert all(gradient is not None for gradient in results.gradients.weights)
