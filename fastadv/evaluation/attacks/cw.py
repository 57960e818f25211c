"""The two attacks papers call CW: PGD on a margin of logits (Carlini & Wagner, 2017, loss f6).

They are not interchangeable; report which one a number was computed with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.evaluation.attacks.names import AttackSpec
from fastadv.evaluation.attacks.pgd_loop import pgd_with_restarts
from fastadv.evaluation.attacks.problem import Loss, Problem

STEPS = 100
KAPPA = 10.0


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
    return _margin_pgd(problem, spec, margin, only_correct=True)


def hinge(logits: Tensor, problem: Problem) -> Tensor:
    """-relu(z_y - max(max_{j != y} z_j, 0) + 10), (B,); in a targeted attack the difference has the
    other sign (Carlini & Wagner, 2017)."""
    true = _is_true(logits, problem.y)
    runner_up = logits.masked_fill(true, 0.0).amax(1)
    ahead = _true_logit(logits, true) - runner_up
    return -((-ahead if problem.threat.targeted else ahead) + KAPPA).relu()


def margin(logits: Tensor, problem: Problem) -> Tensor:
    """max_{j != y} z_j - z_y, (B,): above 0 if misclassified; in a targeted attack its negative."""
    true = _is_true(logits, problem.y)
    behind = logits.masked_fill(true, -float("inf")).amax(1) - _true_logit(logits, true)
    return -behind if problem.threat.targeted else behind


def _is_true(logits: Tensor, y: Tensor) -> Tensor:
    return y[:, None] == torch.arange(logits.shape[1], device=y.device)


def _true_logit(logits: Tensor, true: Tensor) -> Tensor:
    # Not gather: the summation order of its backward is not deterministic on CUDA.
    return logits.masked_fill(~true, 0.0).sum(1)


def _margin_pgd(problem: Problem, spec: AttackSpec, loss: Loss, only_correct: bool) -> Tensor:
    return pgd_with_restarts(
        problem,
        loss,
        alpha=spec.alpha,
        steps=STEPS if spec.steps is None else spec.steps,
        restarts=spec.restarts or 1,
        random=spec.random_start is not False,
        only_correct=only_correct,
    )
