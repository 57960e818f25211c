"""Checks that attacks grow with what they are given: more steps, and a larger ball."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from fastadv.evaluation.sanity.chance import counted, is_above, is_weaker
from fastadv.evaluation.sanity.finding import Finding
from fastadv.evaluation.sanity.trial import GRADIENT, Attacked, Trial
from fastadv.threat import Threat
from fastadv.threat.values import widest_range

LONGEST = "pgd-50"
STEPS = ("fgsm", "pgd-10", LONGEST)
WIDEST_STEPS = 20  # in the largest ball, which they have to cross
LEFT = 0.05  # the share of images that may resist without bounds: steps this long miss a few


def steps_of(name: str) -> int:
    """The number of gradients of an attack of ``STEPS``."""
    return int(name.partition("-")[2] or 1)


def longest(trial: Trial) -> Attacked:
    """PGD with the most steps, from a random point."""
    return trial.by_gradient(LONGEST, GRADIENT * steps_of(LONGEST), random_start=True)


def more_steps(trial: Trial) -> Finding:
    """PGD with more steps is not weaker than with fewer."""
    outcomes = {"clean": trial.y == trial.y}
    for name in STEPS:
        # From the image: only the longest begins at random, as it does in the tables.
        random = name == LONGEST
        found = trial.by_gradient(name, GRADIENT * steps_of(name), random_start=random)
        outcomes[name] = found.right
    return _chain(trial, "more steps", outcomes, "more steps make the attack weaker")


def larger_ball(trial: Trial) -> Finding:
    """PGD is not weaker in a larger ball, and in the largest fools the network on every image."""
    start: dict[str, Any] = {"random_start": False}  # the gradient has to do all of the work
    threat, widest = trial.threat, widest_of(trial.threat, trial.x)
    outcomes = {f"eps {threat.nominal:.3g}": trial.by_gradient("pgd-10", 30, **start).right}
    if 2 * threat.nominal < widest.nominal:
        double = trial.attacked("pgd-10", 30, threat.with_eps(threat.of_eps(2)), **start)
        outcomes[f"eps {2 * threat.nominal:.3g}"] = double.right
    name = f"pgd-{WIDEST_STEPS}"
    last = trial.attacked(name, GRADIENT * WIDEST_STEPS, widest, **start).right
    outcomes[f"eps {widest.nominal:.3g}"] = last
    finding = _chain(trial, "larger eps", outcomes, "a larger ball makes the attack weaker")
    resist = int(last.sum())
    if finding.passed and is_above(resist, len(trial), LEFT):
        sentence = (
            f"{finding.sentence}; at eps {widest.nominal:.3g} any image is within reach, and yet "
            f"{name} leaves {counted(resist, len(trial))} standing: it does not find what exists"
        )
        return replace(finding, passed=False, sentence=sentence)
    return finding


def widest_of(threat: Threat, x: Tensor) -> Threat:
    """The ball that holds every image of the box: the range of a pixel in Linf, the diagonal of the
    box in L2."""
    low, high = widest_range(threat.low, threat.high)
    return threat.with_eps((high - low) * (1 if threat.norm == "linf" else math.sqrt(x[0].numel())))


def _chain(trial: Trial, check: str, outcomes: dict[str, Tensor], meaning: str) -> Finding:
    """Attacks by name, each of which should not be weaker than the one before."""
    shares = [f"{100 * int(right.sum()) / trial.total:.1f} % {name}" for name, right in
              outcomes.items()]  # fmt: skip
    sentence = f"accuracy on {trial.total} images: {', '.join(shares)}"
    numbers = {"right": {name: int(right.sum()) for name, right in outcomes.items()}}
    for (before, fewer), (name, more) in pairwise(outcomes.items()):
        lost, won = int((~fewer & more).sum()), int((fewer & ~more).sum())
        if is_weaker(lost, won):
            sentence += (
                f"; {before} fools the network on {lost} images that resist {name}, and on only "
                f"{won} it is the other way round: {meaning}"
            )
            return Finding(check, False, sentence, numbers)
    return Finding(check, True, sentence, numbers)
