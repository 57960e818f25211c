"""FGSM, FGSM-R, FGSM-N, N-FGSM and F+FGSM against their formulas."""

from collections.abc import Callable

import pytest
import torch
from tiny import EPS, assert_same, descend, sgd, tiny_batch, tiny_model, tiny_step, twin
from tiny_staged import gradient_at, recorded
from torch import Tensor, nn
from torch.nn import functional

from fastadv.errors import UserError

Formula = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def fgsm(model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    return (x + EPS * gradient_at(model, x, y).sign()).clamp(0, 1)


def from_start(alpha: float) -> Formula:
    def formula(model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        delta = (x + start).clamp(0, 1) - x
        delta = delta + alpha * gradient_at(model, x + delta, y).sign()
        return (x + delta.clamp(-EPS, EPS)).clamp(0, 1)

    return formula


def fgsm_n(model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    noisy = (x + start).clamp(0, 1)
    return (noisy + EPS * gradient_at(model, noisy, y).sign()).clamp(0, 1)


def n_fgsm(model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    delta = (x + start).clamp(0, 1) - x
    return (x + delta + EPS * gradient_at(model, x + delta, y).sign()).clamp(0, 1)


FORMULAS: dict[str, tuple[Formula, float]] = {
    "fgsm": (fgsm, 0.0),
    "fgsm-r": (from_start(EPS), 1.0),
    "fast": (from_start(1.25 * EPS), 1.0),
    "fgsm-n": (fgsm_n, 1.0),
    "n-fgsm": (n_fgsm, 2.0),
}


@pytest.mark.parametrize("method", FORMULAS)
def test_one_step_is_the_formula(method: str) -> None:
    formula, scale = FORMULAS[method]
    x, y, index, start = tiny_batch()
    model = tiny_model()
    by_hand = twin(model)
    step = tiny_step(model, method)
    metrics = step(x, y, index, start=start * scale if scale else None)
    optimizer = sgd(by_hand)
    x_adv = formula(by_hand, x, y, start * scale)
    loss = functional.cross_entropy(by_hand(x_adv), y)
    descend(optimizer, loss)
    assert_same(model, by_hand)
    torch.testing.assert_close(metrics["loss"], loss.detach())


def furthest(method: str, scale: float) -> tuple[Tensor, Tensor]:
    """How far x' gets from x and from its centre, starting at the border of the noise."""
    x, y, index, start = tiny_batch()
    step = tiny_step(tiny_model(), method)
    made = recorded(step)
    step(0.3 + 0.4 * x, y, index, start=start.sign() * EPS * scale)
    from_x = (made[0].x_adv - (0.3 + 0.4 * x)).abs().max()
    return from_x, (made[0].x_adv - made[0].center).abs().max()


def test_each_attack_stays_in_its_own_ball() -> None:
    two, three = torch.tensor(2 * EPS).double(), torch.tensor(3 * EPS).double()
    one = two / 2
    for method in ("fgsm-r", "fast"):
        assert all(distance <= one + 1e-12 for distance in furthest(method, 1))
    from_x, from_noisy = furthest("fgsm-n", 1)
    torch.testing.assert_close(from_x, two, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(from_noisy, one, rtol=1e-6, atol=1e-6)
    from_x, from_center = furthest("n-fgsm", 2)
    torch.testing.assert_close(from_x, three, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(from_center, from_x)  # the ball is the clean image's


@pytest.mark.parametrize("method", ["fgsm-n", "n-fgsm", "fgsm-r"])
def test_noise_depends_on_the_sample_and_on_the_update(method: str) -> None:
    x, y, index, _ = tiny_batch()
    # Another model's optimizer, running statistics: only the noise tells the updates apart.
    step = tiny_step(tiny_model(), method, optimizer=sgd(tiny_model()), attack_bn="eval")
    made = recorded(step)
    step(x, y, index)
    again = tiny_step(tiny_model(), method, optimizer=sgd(tiny_model()), attack_bn="eval")
    others = recorded(again)
    again(x.flip(0), y.flip(0), index.flip(0))
    torch.testing.assert_close(made[0].x_adv, others[0].x_adv.flip(0))
    torch.testing.assert_close(made[0].center, others[0].center.flip(0))
    step(x, y, index)
    assert not torch.allclose(made[0].x_adv, made[1].x_adv)


def test_the_noise_of_n_fgsm_fills_two_eps() -> None:
    x, y, index, _ = tiny_batch()
    x = torch.full_like(x, 0.5)
    step = tiny_step(tiny_model(), "n-fgsm", alpha=0.0)
    made = recorded(step)
    step(x, y, index)
    noise = (made[0].x_adv - x).abs()
    assert 1.9 * EPS < noise.max() <= 2 * EPS
    assert 0.9 * EPS < noise.mean() < 1.1 * EPS


def test_settings_without_a_gradient_or_a_meaning_are_refused() -> None:
    with pytest.raises(UserError, match="no gradient"):
        tiny_step(tiny_model(), "trades", adversary="fgsm")


def test_n_fgsm_in_an_l2_ball_takes_a_step_of_eps_from_noise_of_two_eps() -> None:
    x, y, index, _ = tiny_batch()
    x = 0.3 + 0.4 * x
    step = tiny_step(tiny_model(), "n-fgsm", norm="l2", attack_bn="eval")
    model, made = twin(step.model).eval(), recorded(step)
    for _ in range(20):
        step(x, y, index)
    begun = made[0].start
    z = begun.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(functional.cross_entropy(model(z), y), z)
    lengths = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(made[0].x_adv, (begun + EPS * gradient / lengths).clamp(0, 1))
    noise = torch.cat([(each.start - x).flatten(1).norm(dim=1) for each in made])
    assert noise.max() <= 2 * EPS
    assert noise.mean() == pytest.approx(EPS, abs=4 * EPS / (3 * len(noise)) ** 0.5)
    away = torch.cat([(each.x_adv - x).flatten(1).norm(dim=1) for each in made])
    assert away.max() > 2 * EPS


def test_fgsm_n_with_a_kl_objective_compares_with_the_clean_image() -> None:
    x, y, index, start = tiny_batch()
    step = tiny_step(tiny_model(), "trades", adversary="fgsm-n")
    made = recorded(step)
    model = twin(step.model).eval()
    step(x, y, index, start=start)
    noisy = (x + start).clamp(0, 1).requires_grad_()
    p = model(x).softmax(1).detach()
    kl = (p * (p.log() - model(noisy).log_softmax(1))).sum(1).mean()
    (gradient,) = torch.autograd.grad(kl, noisy)
    expected = (noisy.detach() + EPS * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(made[0].x_adv, expected)
