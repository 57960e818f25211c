"""Evaluation attacks with radii per image, masks, other ranges of images, and targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_attacks import images, linear_model, small_net
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastadv.errors import UserError
from fastadv.evaluation.accuracy import evaluate
from fastadv.evaluation.attacks import attack
from fastadv.threat import Threat

NAMES = [
    *("fgsm", "fgsm-rwp", "pgd-5", "pgd-3-3", "cw-5", "cw-margin-5-2", "noise-0.1", "clean"),
    *("pgd-3-3-largest", "pgd-5-unclipped"),
]
RADII = torch.tensor([0.02, 0.0, 0.1, 0.05, 0.3, 0.2], dtype=torch.float64)
MEAN, STD = (0.4, 0.6), (0.25, 0.5)


def movable(count: int = 6, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, channels, 6, 6, generator=generator) > 0.5


class Normalised(nn.Module):
    """``model`` of (x - MEAN) / STD."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(normalised(x))


def columns(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def normalised(x: Tensor) -> Tensor:
    return (x - columns(MEAN)) / columns(STD)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_threat_is_its_eps_and_norm(name: str, norm: str) -> None:
    model, (x, y) = small_net(), images()
    expected = attack(model, x, y, name, eps=0.2, norm=norm)
    assert torch.equal(attack(model, x, y, name, threat=Threat(norm, 0.2)), expected)
    eps = torch.tensor(0.2, dtype=torch.float64)
    assert torch.equal(attack(model, x, y, name, eps=eps, norm=norm), expected)
    every = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    masked = attack(model, x, y, name, eps=0.2, norm=norm, mask=every)
    torch.testing.assert_close(masked, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["fgsm", "pgd-20", "pgd-10-3", "cw-20"])
def test_radii_and_a_mask_reach_the_worst_point_of_a_linear_model(name: str) -> None:
    model, weight = linear_model()
    x, y = images(classes=2, shape=(1, 3, 4))
    mask = torch.rand(6, 1, 3, 4, generator=torch.Generator().manual_seed(3)) > 0.5
    uphill = (weight[1] - weight[0]).sign().view(1, 1, 3, 4) * (1 - 2 * y).view(-1, 1, 1, 1)
    radii = RADII.view(-1, 1, 1, 1)
    found = attack(model, x, y, name, eps=RADII)
    torch.testing.assert_close(found, (x + radii * uphill).clamp(0, 1))
    found = attack(model, x, y, name, eps=RADII, mask=mask)
    torch.testing.assert_close(found, (x + radii * uphill * mask).clamp(0, 1))
    assert torch.equal(found[~mask], x[~mask])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_radii_and_masks_follow_their_images_through_restarts(name: str, norm: str) -> None:
    model, (x, y) = small_net(), images()
    radii, mask = RADII * (1 if norm == "linf" else 5), movable()
    together = attack(model, x, y, name, eps=radii, norm=norm, mask=mask)
    assert torch.equal(together[~mask.expand_as(x)], x[~mask.expand_as(x)])
    for row in range(6):
        one, index = slice(row, row + 1), torch.tensor([row])
        threat = Threat(norm, float(radii[row]), mask=mask[one])
        alone = attack(model, x[one], y[one], name, threat=threat, index=index)
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("noise-0.1", "clean")])
def test_normalised_images_are_attacked_in_their_own_box(name: str) -> None:
    model, (x, y) = small_net(), images()
    threat = Threat.normalized(MEAN, STD, eps=0.05)
    found = attack(model, normalised(x), y, name, threat=threat)
    expected = attack(Normalised(model), x, y, name, eps=0.05)
    torch.testing.assert_close(found * columns(STD) + columns(MEAN), expected, rtol=0, atol=1e-12)
    assert (expected - x).abs().amax() > 0.04
    loud = attack(model, normalised(x), y, "noise-3", threat=threat)
    inside = loud * columns(STD) + columns(MEAN)
    assert -1e-12 <= inside.min() < 1e-12
    assert 1 - 1e-12 < inside.max() <= 1 + 1e-12


@pytest.mark.parametrize("name", ["fgsm", "pgd-7"])
@pytest.mark.parametrize("random", [False, True])
def test_a_targeted_attack_descends_to_its_targets(name: str, random: bool) -> None:
    model, (x, _) = small_net(), images()
    target = (model(x).argmax(1) + 1) % 5
    start = 0.05 * torch.rand(x.shape, generator=torch.Generator().manual_seed(9)).double()
    given: dict[str, Any] = {"start": start} if random else {"random_start": False}
    found = attack(model, x, target, name, eps=0.1, targeted=True, **given)
    x_adv = (x + start).clamp(0, 1) if random else x
    steps, alpha = (7, 0.025) if name == "pgd-7" else (1, 0.1)
    for _ in range(steps):
        point = x_adv.clone().requires_grad_()
        cross_entropy(model(point), target, reduction="sum").backward()
        moved = torch.minimum(torch.maximum(x_adv - alpha * point.grad.sign(), x - 0.1), x + 0.1)
        x_adv = moved.clamp(0, 1)
    torch.testing.assert_close(found, x_adv, rtol=0, atol=1e-12)
    same = attack(model, x, target, name, threat=Threat("linf", 0.1, targeted=True), **given)
    assert torch.equal(same, found)


@pytest.mark.parametrize("name", ["pgd-20-3", "cw-20", "cw-margin-20-2"])
def test_targets_are_reached(name: str) -> None:
    model, (x, _) = small_net(), images(24)
    target = model(x).topk(2).indices[:, 1]
    found = attack(model, x, target, name, eps=0.3, targeted=True)
    reached = model(found).argmax(1) == target
    away = model(attack(model, x, target, name, eps=0.3)).argmax(1) == target
    assert reached.all()
    assert not away.any()


def test_a_restart_keeps_a_target_that_was_reached() -> None:
    model, (x, _) = small_net(), images(24)
    target = model(x).topk(2).indices[:, 1]
    once = attack(model, x, target, "pgd-3", eps=0.1, targeted=True)
    often = attack(model, x, target, "pgd-3-6", eps=0.1, targeted=True)
    first, last = (model(each).argmax(1) == target for each in (once, often))
    assert torch.equal(often[first], once[first])
    assert (last | ~first).all()
    assert last.sum() > first.sum() > 0


@pytest.mark.parametrize("mask", [None, movable(1)])
def test_evaluate_counts_in_a_threat(mask: Tensor | None) -> None:
    model, (x, _) = small_net(), images(24)
    y = model(x).argmax(1)
    threat = Threat.normalized(MEAN, STD, eps=0.05)
    if mask is not None:
        threat = threat.filled(mask=mask)
    z = normalised(x)
    names = ("clean", "fgsm", "pgd-5", "pgd-3-3", "cw-5", "noise-0.5")
    scores = evaluate(model, [(z[:10], y[:10]), (z[10:], y[10:])], names, threat=threat)
    for name in names:
        right = (model(attack(model, z, y, name, threat=threat)).argmax(1) == y).double().mean()
        assert scores[name] == pytest.approx(right.item())
    assert scores["pgd-5"] < scores["clean"]


def refused(**options: Any) -> Callable[[], object]:
    name = options.pop("name", "pgd-2")
    x, y = images()
    return lambda: attack(small_net(), options.pop("x", x), y, name, **options)


def evaluated(threat: Threat, *names: str) -> Callable[[], object]:
    return lambda: evaluate(small_net(), [images()], names or ("pgd-2",), threat=threat)


CHANNELS = Threat("linf", (0.1, 0.2))
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "eps twice": (refused(threat=Threat(), eps=0.1), "omit eps= and norm="),
    "norm twice": (refused(threat=Threat(), norm="l2"), "omit eps= and norm="),
    "no threat": (refused(threat="linf"), "threat must be a fastadv.Threat"),
    "few": (refused(eps=RADII[:5]), "eps has 5 values for 6 images"),
    "negative": (refused(eps=-RADII), "eps must be at least 0, not -0.3"),
    "nan": (refused(eps=RADII / 0), "eps must be at least 0"),
    "pixels": (refused(eps=RADII * 100), "eps=30 is more than the whole range of a pixel"),
    "mask": (refused(mask=movable(5)), r"A mask of shape \(5, 1, 6, 6\) does not fit"),
    "floats": (refused(mask=movable().float()), "mask must be a bool tensor"),
    "kl": (refused(objective="kl", targeted=True), "objective='ce' for a targeted attack"),
    "box": (refused(threat=Threat("linf", 0.1, -0.5, 0.5)), r"low=-0.5 and high=0.5"),
    "unit box": (refused(x=images()[0] * 2), r"Images must lie in \[0, 1\]"),
    "channels": (refused(threat=Threat("linf", (0.1,) * 3)), "eps has 3 values, one per channel"),
    "autoattack radii": (refused(name="autoattack", eps=RADII), "'apgd-ce' takes one eps"),
    "autoattack channels": (refused(name="autoattack", threat=CHANNELS), "takes one eps"),
    "autoattack mask": (refused(name="autoattack", mask=movable()), "'apgd-ce' takes no mask"),
    "autoattack target": (refused(name="autoattack", targeted=True), "'apgd-t' takes no targets"),
    "evaluate targets": (evaluated(Threat(targeted=True)), "evaluate counts images that keep"),
    "evaluate radii": (evaluated(Threat("linf", RADII)), "evaluate takes one eps"),
    "evaluate masks": (evaluated(Threat(mask=movable())), r"one mask \(1,C or 1,H,W\)"),
    "evaluate box": (evaluated(Threat("linf", 0.1, (0.0, 0.5), (1.0, 1.0))), r"low=\(0.0, 0.5\)"),
    "evaluate autoattack": (evaluated(CHANNELS, "autoattack"), "takes one eps and one range"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name: str) -> None:
    call, sentence = REFUSED[name]
    with pytest.raises(UserError, match=sentence):
        call()
