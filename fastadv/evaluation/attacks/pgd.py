"""PGD-N with restarts (Madry et al., 2018), the attack of most reported robust accuracies."""

from __future__ import annotations

from torch import Tensor

from fastadv.errors import UserError
from fastadv.evaluation.attacks.names import AttackSpec
from fastadv.evaluation.attacks.pgd_loop import ce, kl, pgd_with_restarts
from fastadv.evaluation.attacks.problem import Problem

STEPS = 10


def pgd(problem: Problem, spec: AttackSpec) -> Tensor:
    """``spec.steps`` (10) steps of ``spec.alpha`` (``Threat.pgd_alpha``) from a random point.

    Every sample is moved in every step, misclassified or not, and the last iterate is returned, as
    in the tables of MEM, TRADES and APART. Code that stops at misclassified samples
    (robust_overfitting and code derived from it) reports the same or a slightly lower accuracy. For
    restarts see ``pgd_with_restarts``.
    """
    random = spec.random_start is not False
    if spec.objective == "kl":
        if problem.threat.targeted:
            raise UserError(
                "objective='kl' leads away from the prediction at the image and to no target; use "
                "objective='ce' for a targeted attack."
            )
        if not random and problem.start is None:
            raise UserError(
                "objective='kl' has no gradient at the image itself; use random_start=True or "
                "give start=."
            )
        problem = problem.with_natural_logits()
    return pgd_with_restarts(
        problem,
        kl if spec.objective == "kl" else ce,
        alpha=spec.alpha,
        steps=STEPS if spec.steps is None else spec.steps,
        restarts=spec.restarts or 1,
        random=random,
    )
