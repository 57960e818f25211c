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

    Every sample is moved in every step, misclassified or not, and the last iterate is returned.
    The start is clipped to the range of images. Released code that does the same: RWP and AWP
    (eval_pgd.py) and GAIRAT (attack_generator.py). Other released code differs in

    - the start, which is not clipped: TRADES (pgd_attack_cifar10.py: 20 steps of 0.003, eps 0.031),
      APART (attack.py) and MEM (train_te.py, in Linf; in L2 it starts at 0.001 n, n normal, which
      is not here): ``pgd-20-unclipped``. Nearly every x' differs, few verdicts do;
    - samples that stop once they are misclassified: robust_overfitting, fast_adversarial and Bag of
      Tricks: ``pgd-20-stopped``, with the same or a slightly lower accuracy;
    - the start at the image itself: AdvLC: ``random_start=False``;
    - what is judged of several restarts: see ``pgd_with_restarts``.
    """
    name = spec.objective or "ce"
    with torch.no_grad():
        natural = problem.with_natural_logits() if name in ("kl", "dlr") else problem
    losses.check(name, problem.threat, 0 if natural.natural is None else natural.natural.shape[1])
    if name == "kl" and spec.random_start is False and problem.start is None:
        raise UserError(
            "objective='kl' has no gradient at the image itself; use random_start=True or "
            "give start=."
        )
    return pgd_with_restarts(
        natural,
        kl if name == "kl" else following(name),
        spec,
        steps=Pgd.default_steps if spec.steps is None else spec.steps,
    )
