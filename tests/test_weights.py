"""AWP and RWP against their algorithms written out, and properties that a wrong one violates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import assert_same, climb, sgd, tiny_batch, twin
from tiny_staged import StagedNet, recorded, staged_model, staged_step, weights_of
from torch import Tensor, nn
from torch.nn import functional

from fastadv.errors import UserError
from fastadv.training.training_step import Step

ATTACK: dict[str, Any] = {"steps": 2, "alpha": 0.04}
# Large enough that the perturbed weights differ visibly; K2 small.
AWP = ATTACK | {"gamma": 0.1}
RWP = AWP | {"weight_steps": 3}
Mask = Callable[[Tensor], Tensor]


def everyone(losses: Tensor) -> Tensor:
    return torch.ones_like(losses)


def attack(model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    return climb(model, x, start, lambda z: functional.cross_entropy(z, y), 0.04, 2, "train")


def matrices(model: nn.Module, stages: tuple[str, ...] = ()) -> dict[str, nn.Parameter]:
    """The kernels and matrices, of these stages only where some are named."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and (not stages or name.startswith(stages))
    }


def direction(
    model: nn.Module, x_adv: Tensor, y: Tensor, chosen: list[nn.Parameter], mask: Mask
) -> list[Tensor]:
    """Gradients of (1/B) sum m_i l_i on a copy of the buffers."""
    buffers = copy.deepcopy(dict(model.named_buffers()))
    losses = functional.cross_entropy(model(x_adv), y, reduction="none")
    found = torch.autograd.grad((mask(losses.detach()) * losses).mean(), chosen)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return list(found)


def outer(
    model: nn.Module, x_adv: Tensor, y: Tensor, chosen: list[nn.Parameter], v: list[Tensor]
) -> None:
    """The optimizer's step at w + v, and v taken back."""
    optimizer = sgd(model)
    with torch.no_grad():
        for weight, shift in zip(chosen, v, strict=True):
            weight += shift
    functional.cross_entropy(model(x_adv), y).backward()
    optimizer.step()
    with torch.no_grad():
        for weight, shift in zip(chosen, v, strict=True):
            weight -= shift


def awp_by_hand(model: nn.Module, stages: tuple[str, ...] = (), mask: Mask = everyone) -> None:
    x, y, _, start = tiny_batch()
    x_adv = attack(model, x, y, start)
    chosen = list(matrices(model, stages).values())
    found = direction(model, x_adv, y, chosen, mask)
    pairs = zip(chosen, found, strict=True)
    v = [0.1 * w.detach().norm() / (g.norm() + 1e-20) * g for w, g in pairs]
    outer(model, x_adv, y, chosen, v)


def rwp_by_hand(model: nn.Module, c_min: float, scope: str, accumulate: str) -> None:
    x, y, _, start = tiny_batch()
    x_adv = attack(model, x, y, start)
    chosen = list(matrices(model).values())
    originals = [weight.detach().clone() for weight in chosen]
    u = [torch.zeros_like(w) for w in originals]
    v = [torch.zeros_like(w) for w in originals]

    def total(tensors: list[Tensor]) -> Tensor:
        return torch.stack([t.square().sum() for t in tensors]).sum().sqrt()

    for _ in range(3):
        with torch.no_grad():
            for weight, original, shift in zip(chosen, originals, v, strict=True):
                weight.copy_(original + shift)
        found = direction(model, x_adv, y, chosen, lambda losses: (losses <= c_min).double())
        base = u if accumulate == "sum" else v
        u = [before + g for before, g in zip(base, found, strict=True)]
        if scope == "global":
            v = [0.1 * total(originals) / (total(u) + 1e-20) * g for g in u]
        else:
            v = [0.1 * w.norm() / (g.norm() + 1e-20) * g for w, g in zip(originals, u, strict=True)]
    with torch.no_grad():
        for weight, original in zip(chosen, originals, strict=True):
            weight.copy_(original)
    outer(model, x_adv, y, chosen, v)


def run(method: str, model: StagedNet | None = None, **options: Any) -> Step:
    x, y, index, start = tiny_batch()
    model = staged_model() if model is None else model
    step = staged_step(model, method, **(AWP | options))
    step(x, y, index % 12, start=start)
    return step


def test_awp() -> None:
    by_hand = staged_model()
    awp_by_hand(by_hand)
    assert_same(run("awp").model, by_hand)


def test_rat_wp_moves_only_the_last_two_stages() -> None:
    by_hand = staged_model()
    awp_by_hand(by_hand, ("layer3", "layer4"))
    step = run("rat-wp")
    assert_same(step.model, by_hand)
    assert len(step.plan.weights.moved_by) == 4  # two kernels a stage


def losses_of(model: nn.Module) -> Tensor:
    """Adversarial cross entropies at the weights the direction is taken at."""
    x, y, _, start = tiny_batch()
    model = copy.deepcopy(model)
    return functional.cross_entropy(model(attack(model, x, y, start)), y, reduction="none").detach()


def test_a_loss_range_takes_the_direction_from_its_samples() -> None:
    low, high = losses_of(staged_model()).sort().values[[2, 5]].tolist()
    by_hand = staged_model()
    awp_by_hand(by_hand, mask=lambda losses: ((losses >= low) & (losses <= high)).double())
    assert_same(run("awp", loss_range=(low, high)).model, by_hand)


def test_a_loss_range_without_samples_is_adversarial_training() -> None:
    assert_same(run("awp", loss_range="100,200").model, run_plain(), tolerance=0)


def run_plain() -> nn.Module:
    x, y, index, start = tiny_batch()
    model = staged_model()
    staged_step(model, "pgd", **ATTACK)(x, y, index % 12, start=start)
    return model


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("accumulate", ["sum", "renormalise"])
def test_rwp(scope: str, accumulate: str) -> None:
    c_min = float(losses_of(staged_model()).median())
    by_hand = staged_model()
    rwp_by_hand(by_hand, c_min, scope, accumulate)
    step = run("rwp", c_min=c_min, weight_steps=3, norm_scope=scope, accumulate=accumulate)
    assert_same(step.model, by_hand)


def test_rwp_with_c_min_0_is_adversarial_training_bit_for_bit() -> None:
    assert_same(run("rwp", c_min=0.0).model, run_plain(), tolerance=0)


def test_masked_samples_carry_no_gradient() -> None:
    """The perturbation does not change when the labels of samples above c_min do."""
    losses = losses_of(staged_model())
    c_min = float(losses.median())
    moves, labels = [], []
    for wrong in (False, True):
        step = staged_step(staged_model(), "rwp", weight_steps=1, c_min=c_min, adversary="none")
        x, y, index, start = tiny_batch()
        x_adv = attack(staged_model(), x, y, start)
        other = other_label(staged_model(), x_adv, y, c_min)
        y = torch.where((losses > c_min) & wrong, other, y)
        labels.append(y)
        step(x_adv, y, index % 12)
        moves.append(step.plan.weights.moved_by)
    assert not torch.equal(*labels)
    for first, second in zip(*moves, strict=True):
        torch.testing.assert_close(first, second)


def other_label(model: nn.Module, x: Tensor, y: Tensor, c_min: float) -> Tensor:
    """Another label whose loss is also above ``c_min``, if there is one."""
    losses = -model(x).log_softmax(1).detach()
    losses[torch.arange(len(y)), y] = -1
    best = losses.argmax(1)
    enough = losses.gather(1, best[:, None])[:, 0] > c_min
    return torch.where(enough, best, y)


def test_rwp_takes_k2_gradients_and_none_after_the_first_without_samples() -> None:
    counted = []
    for c_min in (100.0, 0.0):
        step = staged_step(staged_model(), "rwp", **RWP, c_min=c_min)
        calls: list[int] = []
        reduce = step.plan.weights.reduce
        step.plan.weights.reduce = lambda losses, c=calls, r=reduce: (c.append(1), r(losses))[1]
        x, y, index, start = tiny_batch()
        step(x, y, index % 12, start=start)
        counted.append(len(calls))
    assert counted == [3, 1]


@pytest.mark.parametrize("method", ["awp", "rwp", "rat-wp"])
def test_with_rate_0_weights_stay_bit_for_bit(method: str) -> None:
    x, y, index, start = tiny_batch()
    model = staged_model()
    before = weights_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
    step = staged_step(model, method, optimizer=optimizer, **(AWP | {"gamma": 0.03}))
    for _ in range(3):
        step(x, y, index % 12, start=start)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), before[name]), name


def test_awps_v_has_gamma_times_the_norm_of_its_tensor() -> None:
    step = run("awp")
    weights = matrices(staged_model())
    for v, weight in zip(step.plan.weights.moved_by, weights.values(), strict=True):
        torch.testing.assert_close(v.norm(), 0.1 * weight.detach().norm())


def test_rwps_v_has_gamma_times_the_norm_of_all_tensors() -> None:
    step = run("rwp", c_min=100.0)
    weights = [w.detach() for w in matrices(staged_model()).values()]
    moved = step.plan.weights.moved_by
    norms = [torch.cat([t.flatten() for t in tensors]).norm() for tensors in (moved, weights)]
    torch.testing.assert_close(norms[0], 0.1 * norms[1])
    ratios = [v.norm() / w.norm() for v, w in zip(moved, weights, strict=True)]
    assert max(ratios) > 1.2 * min(ratios)  # unlike AWP's, not alike in every layer


Judge = Callable[[Tensor, Tensor], Tensor]


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({"weights": "awp"}, lambda total, ce: torch.ones_like(ce)),
        ({"weights": "rwp", "c_min": 1.42}, lambda total, ce: (total <= 1.42).double()),
        (
            {"weights": "rwp", "c_min": 1.53, "rwp_loss": "adversarial"},
            lambda total, ce: (ce <= 1.53).double(),
        ),
        (
            {"weights": "rwp", "c_min": 1.5, "loss_range": (1.2, 9.0)},
            lambda total, ce: ((total <= 1.5) & (ce >= 1.2)).double(),
        ),
    ],
)
def test_weights_are_perturbed_along_the_whole_trades_objective(
    options: dict[str, Any], mask: Judge
) -> None:
    x, y, index, start = tiny_batch()
    model = staged_model()
    by_hand = twin(model)
    known = {"gamma": 0.1, "warmup_epochs": 0, "beta": 20.0, "norm_scope": "tensor"}
    known["bn_passes"] = ("natural", "adversarial")
    steps = {"weight_steps": 1} if options["weights"] == "rwp" else {}
    step = staged_step(model, "trades-awp", **(ATTACK | known | steps | options))
    made = recorded(step)
    step(x, y, index % 12, start=start)
    x_adv, chosen = made[0].x_adv, list(matrices(by_hand).values())

    def losses() -> tuple[Tensor, Tensor]:
        z, z_adv = by_hand(x), by_hand(x_adv)
        p = z.softmax(1)
        kl = (p * (p.log() - z_adv.log_softmax(1))).sum(1)
        total = functional.cross_entropy(z, y, reduction="none") + 20 * kl
        return total, functional.cross_entropy(z_adv, y, reduction="none")

    buffers = copy.deepcopy(dict(by_hand.named_buffers()))
    total, ce = losses()
    taken = mask(total.detach(), ce.detach())
    assert options["weights"] == "awp" or 0 < taken.sum() < len(y)
    if options["weights"] == "rwp":  # by the other loss others would be taken
        assert not torch.equal(taken, mask(ce.detach(), total.detach()))
    found = torch.autograd.grad((taken * total).mean(), chosen)
    for name, buffer in by_hand.named_buffers():
        buffer.copy_(buffers[name])
    optimizer = sgd(by_hand)
    v = [0.1 * w.detach().norm() / g.norm() * g for w, g in zip(chosen, found, strict=True)]
    with torch.no_grad():
        for weight, shift in zip(chosen, v, strict=True):
            weight += shift
    losses()[0].mean().backward()
    optimizer.step()
    with torch.no_grad():
        for weight, shift in zip(chosen, v, strict=True):
            weight -= shift
    assert_same(model, by_hand)


def test_warm_up_is_adversarial_training() -> None:
    x, y, index, start = tiny_batch()
    models = [staged_model(), staged_model()]
    warm = staged_step(models[0], "awp", **AWP, warmup_epochs=1, steps_per_epoch=2)
    plain = staged_step(models[1], "pgd", **ATTACK)
    for step in (warm, plain):
        step(x, y, index % 12, start=start)
        step(x, y, index % 12, start=start)
    assert_same(*models, tolerance=0)
    warm(x, y, index % 12, start=start)
    plain(x, y, index % 12, start=start)
    assert not torch.equal(models[0].linear.weight, models[1].linear.weight)


def test_unsupported_settings_are_refused() -> None:
    x, y, index, _ = tiny_batch()
    with pytest.raises(UserError, match="layer group '7'"):
        staged_step(staged_model(), "at-awp-k", groups="7")(x, y, index % 12)
    with pytest.raises(UserError, match="follows the epochs"):
        staged_step(staged_model(), "trades-awp", steps_per_epoch=None)(x, y, index % 12)
    with pytest.raises(UserError, match="loss_range"):
        staged_step(staged_model(), "awp", loss_range="2,1")
    with pytest.raises(UserError, match="2 values"):
        staged_step(staged_model(), "awp", loss_range="2")
    with pytest.raises(UserError, match="update=False"):
        staged_step(staged_model(), "awp")(x, y, index % 12, update=False)
