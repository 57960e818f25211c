"""The two attacks papers call CW: PGD on a margin of logits (Carlini & Wagner, 2017, loss f6).

They are not interchangeable; report which one a number was computed with.
"""

from __future__ import annotations

from torch import Tensor

from fastadv.evaluation.attacks.names import AttackSpec
from fastadv.evaluation.attacks.pgd_loop import following, pgd_with_restarts
from fastadv.evaluation.attacks.problem import Loss, Problem
from fastadv.evaluation.search import losses
from fastadv.evaluation.search.pgd import Cw


def of_rwp(problem: Problem, spec: AttackSpec) -> Tensor:
    """CW of RWP and AWP: 100 steps that maximise -relu(z_y - r + 10).

    r is the largest of the other logits and 0. The 0 comes from the released code, which finds the
    runner-up after multiplying the true logit by zero.
    """
    return _margin_pgd(problem, spec, hinge, only_correct=False)


def of_bag_of_tricks(problem: Problem, spec: AttackSpec) -> Tensor:
    """CW of Bag of Tricks (Pang et al., 2021): 100 steps that maximise max_{j != y} z_j - z_y.

    A sample is no longer moved once it is misclassified (targeted: once it has the class ``y``).
    """
    return _margin_pgd(problem, spec, following("margin"), only_correct=True)


def hinge(logits: Tensor, problem: Problem) -> Tensor:
    """``losses.hinge`` (B,)."""
    return losses.hinge(logits, problem.y, targeted=problem.threat.targeted)


def _margin_pgd(problem: Problem, spec: AttackSpec, loss: Loss, only_correct: bool) -> Tensor:
    return pgd_with_restarts(
        problem,
        loss,
        alpha=spec.alpha,
        steps=Cw.default_steps if spec.steps is None else spec.steps,
        restarts=spec.restarts or 1,
        random=spec.random_start is not False,
        only_correct=only_correct,
    )
