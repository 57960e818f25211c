"""PGD-N with restarts (Madry et al., 2018), the attack of most reported robust accuracies."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.errors import UserError
from fastadv.evaluation.attacks.names import AttackSpec
from fastadv.evaluation.attacks.pgd_loop import following, kl, pgd_with_restarts
from fastadv.evaluation.attacks.problem import Problem
from fastadv.evaluation.search import losses
from fastadv.evaluation.search.pgd import Pgd


def pgd(problem: Problem, spec: AttackSpec) -> Tensor:
    """``spec.steps`` (10) steps of ``spec.alpha`` (``Threat.pgd_alpha``) from a random point.

    Every sample is moved in every step, misclassified or not, and the last iterate is returned, as
    in the tables of MEM, TRADES and APART. Code that stops at misclassified samples
    (robust_overfitting and code derived from it) reports the same or a slightly lower accuracy. For
    restarts see ``pgd_with_restarts``.
    """
    random = spec.random_start is not False
    name = spec.objective or "ce"
    with torch.no_grad():
        natural = problem.with_natural_logits() if name in ("kl", "dlr") else problem
    losses.check(name, problem.threat, 0 if natural.natural is None else natural.natural.shape[1])
    if name == "kl" and not random and problem.start is None:
        raise UserError(
            "objective='kl' has no gradient at the image itself; use random_start=True or "
            "give start=."
        )
    return pgd_with_restarts(
        natural,
        kl if name == "kl" else following(name),
        alpha=spec.alpha,
        steps=Pgd.default_steps if spec.steps is None else spec.steps,
        restarts=spec.restarts or 1,
        random=random,
    )
