"""The table of all checks, with what each costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fastadv.evaluation.sanity import gradients, outputs, rivals, rounding, strength
from fastadv.evaluation.sanity.finding import Finding
from fastadv.evaluation.sanity.substitute import ROUNDS
from fastadv.evaluation.sanity.trial import GRADIENT, Trial


class Check(NamedTuple):
    """A check, and the passes per image that it adds at most."""

    run: Callable[[Trial], Finding]
    passes: int


_STEPS = sum(GRADIENT * strength.steps_of(name) + 1 for name in strength.STEPS)

CHECKS = (
    Check(outputs.repeats, 1),
    Check(outputs.logits, 0),
    Check(gradients.not_zero, GRADIENT),
    Check(gradients.true, GRADIENT + 2 * len(gradients.STRIDES)),
    Check(strength.more_steps, _STEPS),
    Check(gradients.not_saturated, GRADIENT * (rivals.MARGIN_STEPS + 1) + 2),
    Check(strength.larger_ball, GRADIENT * (10 + strength.WIDEST_STEPS) + 2),
    Check(rivals.black_box, rivals.QUERIES + 2),
    Check(rivals.random_search, rivals.POINTS),
    Check(rivals.transfer, ROUNDS),
    Check(rounding.survives, 1),
)

TIMED, TIMED_PASSES = "pgd-4", GRADIENT * 4
"""A short attack, whose time tells that of the checks."""

MOST_PASSES = sum(check.passes for check in CHECKS) + TIMED_PASSES + 2
"""Per image, all checks together: below those of PGD-200, 600."""
