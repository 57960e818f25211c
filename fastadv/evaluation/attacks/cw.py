"""The two attacks papers call CW: PGD on a margin of logits (Carlini & Wagner, 2017, loss f6).

They are not interchangeable; report which one a number was computed with.
"""

from __future__ import annotations

from torch import Tensor

from fastadv.evaluation.attacks.names import AttackSpec
from fastadv.evaluation.attacks.pgd_loop import following, pgd_with_restarts
from fastadv.evaluation.attacks.problem import Problem
from fastadv.evaluation.search import losses
from fastadv.evaluation.search.pgd import Cw, CwMargin
from fastadv.evaluation.search.search import Search


def of_rwp(problem: Problem, spec: AttackSpec) -> Tensor:
    """CW of RWP and AWP (eval_pgd.py): 100 steps that maximise -relu(z_y - r + 10).

    r is the largest of the other logits and 0. The 0 comes from the released code, which finds the
    runner-up after multiplying the true logit by zero. Of several restarts that code judges the one
    with the largest cross entropy: ``cw-100-5-largest``. GAIRAT's loss of that name has 50 in place
    of 10 and no such 0, and is not here.
    """
    return pgd_with_restarts(problem, hinge, spec, steps=_steps(spec, Cw))


def of_bag_of_tricks(problem: Problem, spec: AttackSpec) -> Tensor:
    """CW of Bag of Tricks (Pang et al., 2021, utils_plus.py): 10 steps that maximise
    max_{j != y} z_j - z_y.

    A sample is no longer moved once it is misclassified (targeted: once it has the class ``y``).
    One run here; eval_cifar.py makes 10 and judges the one with the largest cross entropy:
    ``cw-margin-10-10-largest``.
    """
    return pgd_with_restarts(
        problem, following("margin"), spec, steps=_steps(spec, CwMargin), stopped=True
    )


def hinge(logits: Tensor, problem: Problem) -> Tensor:
    """``losses.hinge`` (B,)."""
    return losses.hinge(logits, problem.y, targeted=problem.threat.targeted)


def _steps(spec: AttackSpec, search: type[Search]) -> int:
    return search.default_steps if spec.steps is None else spec.steps
