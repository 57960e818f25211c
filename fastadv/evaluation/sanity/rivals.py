"""Checks that no attack without the network's gradient finds what the gradient does not."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.engine.noise import noise_stream
from fastadv.evaluation.sanity import strength
from fastadv.evaluation.sanity.chance import interval, is_above
from fastadv.evaluation.sanity.finding import Finding
from fastadv.evaluation.sanity.substitute import Substitute
from fastadv.evaluation.sanity.trial import GRADIENT, Trial
from fastadv.evaluation.search.apgd import ApgdDlr

MISSED = 0.01  # the share of images that only an attack without the gradient may fool
MARGIN_STEPS = 20  # of APGD-DLR, which together with PGD is the attack by gradient
QUERIES = 180
POINTS = 30
TRANSFER = "pgd-20"
CORNERS = noise_stream("evaluation.sanity.corners")


def white_box(trial: Trial) -> None:
    """The gradient attacks that the others are compared with: PGD, and APGD on the ratio of logits
    (of two classes, on the cross entropy). What they leave standing is ``trial.standing``."""
    strength.longest(trial)
    loss = "dlr" if trial.logits.shape[1] >= ApgdDlr.least_classes else "ce"
    trial.by_gradient(f"apgd-{loss}-{MARGIN_STEPS}", GRADIENT * (MARGIN_STEPS + 1))


def black_box(trial: Trial) -> Finding:
    """Square (Andriushchenko et al., 2020), which only sees outputs."""
    white_box(trial)
    left = trial.left()
    right = trial.attacked(f"square-{QUERIES}", QUERIES, rows=left).right
    return _missed(trial, "black box", f"Square with {QUERIES} queries fools", ~right)


def random_search(trial: Trial) -> Finding:
    """Random points on the surface of the ball: corners of the cube in Linf."""
    white_box(trial)
    left = trial.left()
    x, y, index = trial.x[left], trial.y[left], trial.index[left]
    fooled = torch.zeros(len(left), dtype=torch.bool, device=x.device)
    for draw in range(POINTS if len(left) else 0):
        noise = kernels.noise_normal(
            index, tuple(x.shape[1:]), trial.seed, CORNERS.shift + draw, CORNERS.number, x.dtype
        )
        moved = trial.threat.step(x, noise, x, trial.threat.radius(x))
        fooled |= ~trial.judged(moved, y).right
    return _missed(trial, "random search", f"{POINTS} random points of the ball fool", fooled)


def transfer(trial: Trial) -> Finding:
    """Adversarial images of another network: the one given, or a small one that has learned this
    network's answers."""
    white_box(trial)
    left = trial.left()
    if trial.other is None:
        fooled = Substitute(trial).fooled()[left]
        by = "transferred from a small network that learned the answers, adversarial images fool"
    else:
        fooled = ~trial.attacked(TRANSFER, 0, rows=left, model=trial.other).right
        by = "transferred from the other network, adversarial images fool"
    return _missed(trial, "transfer", by, fooled)


def _missed(trial: Trial, check: str, by: str, fooled: Tensor) -> Finding:
    """``fooled`` (m,) bool: of the images that stand against the gradient."""
    count, n = int(fooled.sum()), len(trial)
    passed = not is_above(count, n, MISSED)
    sentence = (
        f"of {n} images, {by} {count} that resist all gradient attacks ({interval(count, n)})"
    )
    if not passed:
        sentence += "; it should not find what they do not, so the gradient is masked"
    numbers = {"only": count, "standing": int(trial.standing.sum()), "of": n}
    return Finding(check, passed, sentence, numbers)
