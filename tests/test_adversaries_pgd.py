"""PGD in both norms, both BatchNorm modes and with both losses against its formula."""

import pytest
import torch
from tiny import (
    EPS,
    assert_same,
    climb,
    descend,
    sgd,
    tiny_batch,
    tiny_model,
    tiny_step,
    twin,
)
from tiny_staged import recorded
from torch import Tensor, nn
from torch.nn import functional

ALPHA, STEPS = 0.04, 3


@pytest.mark.parametrize("bn", ["train", "eval"])
def test_linf(bn: str) -> None:
    x, y, index, start = tiny_batch()
    model = tiny_model()
    by_hand = twin(model)
    tiny_step(model, "pgd", attack_bn=bn, alpha=ALPHA, steps=STEPS)(x, y, index, start=start)
    optimizer = sgd(by_hand)
    x_adv = climb(by_hand, x, start, lambda z: functional.cross_entropy(z, y), ALPHA, STEPS, bn)
    descend(optimizer, functional.cross_entropy(by_hand(x_adv), y))
    assert_same(model, by_hand)


@pytest.mark.parametrize("bn", ["train", "eval"])
def test_an_attack_on_the_kl(bn: str) -> None:
    x, y, index, start = tiny_batch()
    model = tiny_model()
    by_hand = twin(model)
    options = {"attack_loss": "kl", "attack_bn": bn, "alpha": ALPHA, "steps": STEPS}
    tiny_step(model, "pgd", **options)(x, y, index, start=start)
    optimizer = sgd(by_hand)
    by_hand.train(bn == "train")
    p = by_hand(x).softmax(1).detach()  # in train mode this pass moves the statistics once

    def kl(z: Tensor) -> Tensor:
        return (p * (p.log() - z.log_softmax(1))).sum(1).mean()

    x_adv = climb(by_hand, x, start, kl, ALPHA, STEPS, bn)
    descend(optimizer, functional.cross_entropy(by_hand(x_adv), y))
    assert_same(model, by_hand)


def climb_l2(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, eps: float) -> Tensor:
    def lengths(t: Tensor) -> Tensor:
        return t.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def into(delta: Tensor) -> Tensor:
        delta = delta * (eps / lengths(delta)).clamp(max=1)
        return (x + delta).clamp(0, 1)

    x_adv = into(start)
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_()
        loss = functional.cross_entropy(model(x_adv), y)
        (gradient,) = torch.autograd.grad(loss, x_adv)
        step = 15 / 128 * eps * gradient / (lengths(gradient) + 1e-10)
        x_adv = into(x_adv.detach() + step - x)
    return x_adv.detach()


def test_l2_with_its_usual_step() -> None:
    x, y, index, start = tiny_batch()
    model, eps = tiny_model(), 0.5
    by_hand = twin(model)
    step = tiny_step(model, "pgd", norm="l2", eps=eps, steps=STEPS)
    made = recorded(step)
    step(x, y, index, start=start)
    optimizer = sgd(by_hand)
    x_adv = climb_l2(by_hand, x, y, start, eps)
    descend(optimizer, functional.cross_entropy(by_hand(x_adv), y))
    assert_same(model, by_hand)
    assert (made[0].x_adv - x).flatten(1).norm(dim=1).max() <= eps + 1e-9


def test_the_usual_step_is_a_quarter_of_eps() -> None:
    x, y, index, start = tiny_batch()
    models = [tiny_model(), tiny_model()]
    tiny_step(models[0], "pgd", steps=STEPS)(x, y, index, start=start)
    tiny_step(models[1], "pgd", steps=STEPS, alpha=EPS / 4)(x, y, index, start=start)
    assert_same(*models, tolerance=0)


def test_of_several_restarts_the_worst_is_kept_for_each_sample() -> None:
    x, y, index, start = tiny_batch()
    options = {"steps": 1, "attack_bn": "eval"}
    made = []
    for restarts in (1, 3):
        step = tiny_step(tiny_model(), "pgd", restarts=restarts, **options)
        found = recorded(step)
        frozen = twin(step.model).eval()
        step(x, y, index, start=start)
        made.append(functional.cross_entropy(frozen(found[0].x_adv), y, reduction="none"))
    assert (made[1] >= made[0] - 1e-12).all()
    assert (made[1] > made[0] + 1e-6).any()


def test_of_several_restarts_of_a_kl_attack_the_largest_kl_is_kept() -> None:
    x, y, index, _ = tiny_batch()
    made, kls = {}, {}
    for restarts in (1, 2):
        step = tiny_step(tiny_model(), "trades", steps=2, restarts=restarts)
        found = recorded(step)
        frozen = twin(step.model).eval()
        step(x, y, index)
        made[restarts] = found[0].x_adv
        p = frozen(x).softmax(1).detach()
        kls[restarts] = (p * (p.log() - frozen(made[restarts]).log_softmax(1))).sum(1)
    assert (kls[2] >= kls[1] - 1e-12).all()
    assert (kls[2] > kls[1]).any()
    # By cross entropy another restart would have been kept for some.
    ce = [functional.cross_entropy(frozen(made[r]), y, reduction="none") for r in (1, 2)]
    assert (ce[1] < ce[0]).any()


def test_of_several_restarts_the_targets_term_counts() -> None:
    """TE attacks cross-entropy plus w |p(x') - its averaged prediction|^2, and so chooses."""
    x, y, index, _ = tiny_batch()
    weight, momentum = 1e7, 0.9  # the predictions of this network hardly move
    losses, ces = {}, {}
    for restarts in (1, 5):
        options = {"te_weight": weight, "te_momentum": momentum, "te_start": 0, "te_end": 0}
        step = tiny_step(
            tiny_model(), "te", steps=1, alpha=0.0, restarts=restarts, attack_bn="eval", **options
        )
        step.set_epoch(0)
        found = recorded(step)
        frozen = twin(step.model).eval()
        step(x, y, index)
        x_adv = found[0].x_adv
        soft = frozen(x).softmax(1).detach()  # the first average: of this prediction alone
        apart = (frozen(x_adv).softmax(1) - soft).square().sum(1)
        ces[restarts] = functional.cross_entropy(frozen(x_adv), y, reduction="none")
        losses[restarts] = ces[restarts] + weight * apart
    assert (losses[5] >= losses[1] - 1e-12).all()
    assert (losses[5] > losses[1]).any()
    # By cross-entropy alone another restart would have been kept for some.
    assert (ces[5] < ces[1]).any()


def test_shares_of_correct_steps_are_of_the_restart_that_is_kept() -> None:
    x, y, index, _ = tiny_batch()
    options = {"steps": STEPS, "objective": "gairat", "gairat_start": 1, "attack_bn": "eval"}
    step = tiny_step(tiny_model(), "pgd", restarts=2, **options)
    step.set_epoch(0)
    climbs = []
    climb_once = step.plan.adversary._climb

    def noting(*inputs: object) -> object:
        climbs.append(climb_once(*inputs))
        return climbs[-1]

    step.plan.adversary._climb = noting
    made = recorded(step)
    with torch.no_grad():
        y = twin(step.model).eval()(x).argmax(1)
    step(x, y, index)
    counts = [correct for *_, correct in climbs]
    second = (made[0].x_adv == climbs[1][1]).flatten(1).all(1)
    assert second.any()
    assert not second.all()
    kept = torch.where(second, counts[1], counts[0])
    assert torch.equal(made[0].context.correct_share, kept)


def test_shares_of_correct_steps() -> None:
    x, y, index, start = tiny_batch()
    step = tiny_step(
        tiny_model(), "pgd", steps=STEPS, objective="gairat", gairat_start=1, attack_bn="eval"
    )
    step.set_epoch(0)
    made = recorded(step)
    model = twin(step.model).eval()
    step(x, y, index, start=start)
    correct = torch.zeros_like(y)

    def loss(z: Tensor) -> Tensor:
        return functional.cross_entropy(z, y)

    for done in range(STEPS):
        x_adv = climb(model, x, start, loss, EPS / 4, done, "eval")
        model.eval()
        correct += model(x_adv).argmax(1) == y
    torch.testing.assert_close(made[0].context.correct_share, correct / STEPS)


def test_a_kl_attack_starts_at_a_distance_of_0_001_from_the_image() -> None:
    x, y, index, _ = tiny_batch()
    x = 0.2 + 0.6 * x
    step = tiny_step(tiny_model(), "trades", steps=1, alpha=0.0)
    made = recorded(step)
    step(x, y, index)
    assert 0.0008 < (made[0].x_adv - x).std() < 0.0012
