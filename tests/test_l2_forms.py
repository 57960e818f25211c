"""PGD in L2 as in yaodongyu/TRADES and as in locuslab/robust_overfitting, against plain loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import TinyNet, assert_same, sgd, tiny_batch, tiny_model, tiny_step, twin
from tiny_capture import capture
from torch import Tensor, nn
from torch.nn import functional

from fastadv.algorithms.resolution import resolve
from fastadv.threat import Threat

EPS, STEPS, BETA, UPDATES = 0.5, 3, 5.0, 3
MODES = ["eager", "captured", pytest.param("compiled", marks=pytest.mark.slow)]
TRADES = ("trades", "trades-awp", "trades-rwp", "trades-awp-k", "trades-sat")
RST = ("rst", "rst-awp", "rst-rwp")


def batch(update: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x with many saturated pixels, y, index, and a start in the ball and in the box."""
    x, y, index, start = tiny_batch(seed=update)
    x = (3 * x - 0.5).clamp(0, 1)
    return x, y, index, (0.1 * start).clamp(-x, 1 - x)


def lengths(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def into_ball(delta: Tensor) -> Tensor:
    return delta * (EPS / lengths(delta)).clamp(max=1)


def kl(p: Tensor, logits: Tensor) -> Tensor:
    return (p * (p.log() - functional.log_softmax(logits, 1))).sum()


def published(model: nn.Module, form: str) -> None:
    """``UPDATES`` updates by TRADES in L2. ``form``: "trades" or "robust-overfitting"."""
    optimizer = sgd(model)
    for update in range(UPDATES):
        x, y, _, delta = batch(update)
        model.eval()
        natural = functional.softmax(model(x), 1).detach()
        for _ in range(STEPS):
            delta = delta.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(kl(natural, model(x + delta)), delta)
            size = 2 * EPS / STEPS if form == "trades" else 15 / 128 * EPS
            delta = delta.detach() + size * gradient / lengths(gradient)
            if form == "trades":
                delta = into_ball(delta.clamp(-x, 1 - x))
            else:
                delta = into_ball(delta).clamp(-x, 1 - x)
        model.train()
        x_adv = (x + delta).clamp(0, 1)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        adversarial = model(x_adv)
        robust = kl(functional.softmax(model(x), 1), adversarial) / len(x)
        (loss + BETA * robust).backward()
        optimizer.step()


def ours(model: TinyNet, mode: str = "eager", method: str = "trades", **options: Any) -> Any:
    made = "compiled" if mode == "compiled" else "eager"
    known = {"steps": STEPS, "norm": "l2", "eps": EPS} | options
    if method == "trades":
        known["beta"] = BETA
    step = tiny_step(model, method, mode=made, **known)
    if mode == "captured":
        capture(step)
    for update in range(UPDATES):
        x, y, index, start = batch(update)
        step(x, y, index, start=start)
    assert step.healthy()
    return step


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["trades", "robust-overfitting"])
def test_three_updates_of_trades_in_l2(form: str, mode: str) -> None:
    model, by_hand = tiny_model(), tiny_model()
    published(by_hand, form)
    ours(model, mode, l2_form=form)
    # The guard of a gradient's norm, and that of torch.renorm in the published code, are 1e-7.
    assert_same(model, by_hand, 1e-7)


def test_the_two_forms_differ_and_in_linf_do_not() -> None:
    for norm, alike in (("l2", False), ("linf", True)):
        first, second = tiny_model(), tiny_model()
        ours(first, norm=norm, eps=0.1, l2_form="trades")
        ours(second, norm=norm, eps=0.1, l2_form="robust-overfitting")
        assert torch.equal(first.conv1.weight, second.conv1.weight) == alike


@pytest.mark.parametrize("mode", MODES)
def test_a_step_of_ones_own_is_that_of_advertorch(mode: str) -> None:
    """PGD on the cross entropy, as Chen et al. 2021 and Tack et al. 2022 attack in L2."""
    model, by_hand = tiny_model(), tiny_model()
    optimizer, alpha = sgd(by_hand), 0.8 * EPS
    for update in range(UPDATES):
        x, y, _, delta = batch(update)
        for _ in range(STEPS):
            delta = delta.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(
                functional.cross_entropy(by_hand(x + delta), y), delta
            )
            moved = delta.detach() + alpha * gradient / lengths(gradient)
            delta = into_ball((x + moved).clamp(0, 1) - x)
        optimizer.zero_grad()
        functional.cross_entropy(by_hand((x + delta).clamp(0, 1)), y).backward()
        optimizer.step()
    made = tiny_model()
    ours(model, mode, "pgd", l2_form="trades", alpha=alpha)
    assert_same(model, by_hand, 1e-9)
    ours(made, mode, "pgd", alpha=alpha)
    assert not torch.allclose(made.conv1.weight, by_hand.conv1.weight, rtol=1e-5)


def test_an_image_without_a_gradient_stays() -> None:
    class Blind(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            seen = (x.detach()[:, :, 0, 0] > 0).double().prod(1).view(-1, 1, 1, 1)
            return super().forward(seen * x)

    x, y, index, start = batch(0)
    x = 0.2 + 0.5 * x
    x[0, :, 0, 0] = 0.0
    start = torch.zeros_like(start)
    start[1:] = 0.01
    model = Blind().double()
    model.load_state_dict(tiny_model().state_dict())
    options = {"steps": 2, "norm": "l2", "eps": EPS, "l2_form": "trades"}
    step = tiny_step(model, "pgd", attack_bn="eval", **options)
    found = []
    adversary = step.plan.adversary
    made = adversary.make
    object.__setattr__(adversary, "make", lambda *given: found.append(made(*given)) or found[-1])
    step(x, y, index, start=start)
    moved = lengths(found[0].x_adv - x).flatten()
    assert moved[0] == 0
    assert moved[1:].min() > 0.1


def test_its_end_is_in_the_ball_and_in_the_box_with_radii_and_a_mask() -> None:
    x, y, index, start = batch(0)
    mask = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(3)) > 0.5
    radii = torch.linspace(0.1, 0.8, 8, dtype=torch.float64)
    step = tiny_step(tiny_model(), "pgd", norm="l2", eps=EPS, steps=STEPS, l2_form="trades")
    found = []
    adversary = step.plan.adversary
    made = adversary.make
    object.__setattr__(adversary, "make", lambda *given: found.append(made(*given)) or found[-1])
    step(x, y, index, start=start, eps=radii, mask=mask)
    delta = found[0].x_adv - x
    assert not delta.masked_select(~mask.expand_as(delta)).any()
    assert (lengths(delta).flatten() <= radii * (1 + 1e-12)).all()
    assert found[0].x_adv.min() >= 0
    assert found[0].x_adv.max() <= 1
    step_size = 2 * radii / STEPS
    torch.testing.assert_close(adversary.usual_step(Threat("l2", radii)), step_size)


def test_a_resumed_run_is_bit_for_bit_the_same() -> None:
    step = ours(tiny_model())
    options = {"steps": STEPS, "beta": BETA, "norm": "l2", "eps": EPS}
    other = tiny_step(twin(step.model), "trades", **options)
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    x, y, index, _ = batch(9)
    for each in (step, other):
        each(x, y, index)
    assert_same(step.model, other.model, 0)


def test_recipes_take_the_form_of_their_code() -> None:
    for method in (*TRADES, *RST):
        assert resolve(method).options["l2_form"] == "trades", method
    for method in ("pgd", "awp", "te", "trades-te"):
        assert resolve(method).options["l2_form"] == "robust-overfitting", method
    memorization = resolve("trades", {"variant": "memorization"}).options
    assert memorization["l2_form"] == "robust-overfitting"
