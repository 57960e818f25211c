"""Fused BatchNorm computes what PyTorch's does, whatever reads its output."""

import pytest
import torch
from fused_readers import EVERY, REFUSED
from odd_readers import SAME_EVERY_TIME, made
from test_folding_readers import batch, step_of, view

from fastadv.engine.model import fused_norm
from fastadv.engine.model.replaced_norm import pytorchs
from fastadv.errors import UserError

TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(fused_norm, "DEVICES", ("cpu",))
    monkeypatch.setattr(fused_norm, "DTYPES", (torch.float64, torch.float32))


def images():
    x, y = batch()
    return x.to(memory_format=torch.channels_last), y


def seen(kind, fused):
    """Logits and input gradients of both kinds of attack, weight gradients, the state of a step."""
    torch.manual_seed(3)
    x, y = images()
    model = made(kind).to(memory_format=torch.channels_last)
    step = step_of(model, "pgd", steps=1)
    net = step.internals.net
    net.fused_norm = fused
    found = []
    step(x, y)
    for attack_bn in ("train", "eval"):
        net.copies.invalidate()
        with net.attacking(attack_bn):
            found += view(net.logits, x)
    with net.training():
        logits = net.logits(x)
        weights = list(model.parameters())
        loss = (logits * torch.arange(logits.numel()).view_as(logits).cos()).sum()
        found.append(joined(torch.autograd.grad(loss, weights, materialize_grads=True)))
    return [*found, joined(model.state_dict().values())]


def joined(tensors):
    """One vector: beside the others a bias before a BatchNorm has a gradient of 0 and rounding."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def assert_alike(kind):
    for own, expected in zip(seen(kind, True), seen(kind, False), strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(own / scale, expected / scale, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", EVERY)
def test_readers_of_a_norms_output(name):
    assert_alike(EVERY[name])


@pytest.mark.parametrize("name", SAME_EVERY_TIME)
def test_readers_of_a_convolutions_output(name):
    assert_alike(SAME_EVERY_TIME[name])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name):
    x, y = images()
    step = step_of(made(REFUSED[name]).to(memory_format=torch.channels_last), "pgd")
    step.internals.net.fused_norm = True
    with pytest.raises(UserError, match="pass fused_norm='off'"):
        step(x, y)
    assert torch.nn.functional.batch_norm is pytorchs
