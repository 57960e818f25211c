"""PGD-N with restarts (Madry et al., 2018), the attack most robust accuracies are quoted under."""

from __future__ import annotations

from torch import Tensor

from fastadv.errors import UserError
from fastadv.evaluation.attacks.ascent import ce, climb_from_everywhere, kl
from fastadv.evaluation.attacks.names import AttackSpec
from fastadv.evaluation.attacks.problem import Problem
from fastadv.threat import Threat

STEPS = 10


def usual_alpha(threat: Threat) -> float:
    """The step the papers take: eps/4 in Linf (2/255 at 8/255), 15/128 eps in L2 (15/255 at
    128/255; locuslab/robust_overfitting)."""
    return threat.eps * (1 / 4 if threat.norm == "linf" else 15 / 128)


def ascend(problem: Problem, spec: AttackSpec) -> Tensor:
    """``spec.steps`` (10) steps of ``spec.alpha`` (``usual_alpha``) from a random point.

    Every sample is attacked and moves to the end, misclassified or not, and the last iterate is
    returned, as in the tables of MEM, TRADES and APART; code that freezes misclassified samples
    (robust_overfitting and what grew from it) gives the same or a slightly lower accuracy. With
    restarts see ``climb_from_everywhere``.
    """
    random = spec.random_start is not False
    if spec.objective == "kl":
        if not random and problem.start is None:
            raise UserError(
                "objective='kl' has no gradient at the image itself; use random_start=True or "
                "give start=."
            )
        problem = problem.with_natural_logits()
    return climb_from_everywhere(
        problem,
        kl if spec.objective == "kl" else ce,
        alpha=usual_alpha(problem.threat) if spec.alpha is None else spec.alpha,
        steps=STEPS if spec.steps is None else spec.steps,
        restarts=spec.restarts or 1,
        random=random,
    )
