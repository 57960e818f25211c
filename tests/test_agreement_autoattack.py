"""Robust accuracy of our attacks beside that of the canonical AutoAttack on two robust networks."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv.data.small_sets import make_synthetic, read_digits
from fastadv.evaluation.accuracy import evaluate
from fastadv.evaluation.reference import canonical
from fastadv.threat import Threat

pytest.importorskip("pyautoattack")

SEEDS = 5
COUNT = 60
EPS = {"digits": 0.15, "colour": 0.06}
Setting = tuple[nn.Module, Tensor, Tensor, Threat]


def network(channels: int) -> nn.Module:
    """A network with BatchNorms that can be folded."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


@cache
def setting(data: str) -> Setting:
    """A network trained against FGSM, and images that it has not seen."""
    found = read_digits() if data == "digits" else make_synthetic(train=1024)
    x, y = found.train_images.float() / 255, found.train_labels
    torch.manual_seed(0)
    model = network(x.shape[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    step = fastadv.step(model, optimizer, "fast", eps=EPS[data])
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            step(x[rows], y[rows])
    tests = found.test_images[:COUNT].float() / 255
    return model.eval(), tests, found.test_labels[:COUNT], Threat("linf", EPS[data])


def count(share: float) -> int:
    return round(share * COUNT)


ATTACKS = [
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("apgd-ce", "apgd-dlr")),
    *(pytest.param(name, marks=pytest.mark.long) for name in ("apgd-t", "fab-t", "square")),
]


@pytest.mark.parametrize("data", ["digits", "colour"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_as_strong_as_the_canonical_one(attack: str, data: str) -> None:
    """No further from any of five canonical seeds than these are from each other, and one image."""
    model, x, y, threat = setting(data)
    theirs = [
        count(canonical(model, [(x, y)], attack, threat=threat, seed=seed).accuracies[attack])
        for seed in range(SEEDS)
    ]
    ours = count(evaluate(model, [(x, y)], [attack], threat=threat)[attack])
    assert min(theirs) > 10
    assert max(theirs) < COUNT * 9 / 10
    assert max(theirs) - 1 - (max(theirs) - min(theirs)) <= ours
    assert ours <= min(theirs) + 1 + (max(theirs) - min(theirs))


@pytest.mark.long
@pytest.mark.parametrize("data", ["digits"])
def test_the_cascade_is_as_strong_as_the_canonical_one(data: str) -> None:
    """Image by image: what it leaves robust is what the canonical cascade leaves."""
    model, x, y, threat = setting(data)
    theirs = [
        canonical(model, [(x, y)], "autoattack", threat=threat, seed=seed) for seed in range(SEEDS)
    ]
    scores = evaluate(model, x_y_batches(x, y), ["clean", "autoattack"], threat=threat)
    robust = [int((found.fooled_by < 0).sum()) for found in theirs]
    spread = max(robust) - min(robust)
    assert max(robust) - 1 - spread <= count(scores["autoattack"]) <= min(robust) + 1 + spread
    assert theirs[0].accuracies["clean"] == scores["clean"]
    ours = torch.from_numpy(scores.verdicts["autoattack"].right)
    apart = [int((ours != (found.fooled_by < 0)).sum()) for found in theirs]
    among = [
        int(((one.fooled_by < 0) != (other.fooled_by < 0)).sum())
        for one in theirs
        for other in theirs
    ]
    assert max(apart) <= max(among) + 1


def x_y_batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Batches of another size than the canonical one's."""
    return list(zip(x.split(32), y.split(32), strict=True))
