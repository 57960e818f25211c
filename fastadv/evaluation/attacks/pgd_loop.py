"""The loop all gradient attacks share: projected steps, repeated from several starting points."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.user_loss import require_values
from fastadv.errors import UserError
from fastadv.evaluation.attacks.problem import STREAM, Loss, Problem
from fastadv.evaluation.search import losses
from fastadv.evaluation.search.search import choose
from fastadv.threat import Radius


def ce(logits: Tensor, problem: Problem) -> Tensor:
    """Cross entropy (B,) or the user's criterion, in a targeted attack its negative."""
    if problem.criterion is None:
        loss = losses.ce(logits, problem.y)
    else:
        loss = problem.criterion(logits, problem.y)
        require_values("criterion", loss, len(logits))
        if logits.requires_grad and not loss.requires_grad:
            raise UserError(
                "criterion does not depend on the logits by a gradient, so no attack can follow "
                "it: compute it with differentiable operations of torch."
            )
    return -loss if problem.threat.targeted else loss


def kl(logits: Tensor, problem: Problem) -> Tensor:
    """KL(f(x) || f(x')) (B,), what TRADES maximises (Zhang et al., 2019, Eq. 5)."""
    if problem.natural is None:
        raise RuntimeError("the KL objective was asked for without natural logits")
    return kernels.trades_kl(problem.natural, logits)


def following(objective: str) -> Loss:
    """The loss of PGD that follows an ``objective`` of classes; in a targeted attack its
    negative."""
    if objective == "ce":
        return ce

    def loss(logits: Tensor, problem: Problem) -> Tensor:
        found = losses.OBJECTIVES[objective](logits, problem.y)
        return -found if problem.threat.targeted else found

    return loss


def pgd_loop(
    problem: Problem,
    x_adv: Tensor,
    loss: Loss,
    *,
    alpha: Radius | None,
    steps: int,
    only_correct: bool = False,
) -> Tensor:
    """``steps`` projected steps of size ``alpha`` that increase ``loss``; returns the last iterate.

    ``alpha`` None is ``Threat.pgd_alpha``. With ``only_correct`` a sample is no longer moved once
    the attack on it has succeeded.
    """
    alpha = problem.threat.pgd_alpha if alpha is None else alpha
    for _ in range(steps):
        gradient, logits = problem.gradient(x_adv, loss)
        moved = problem.threat.step(x_adv, gradient, problem.x, alpha)
        if only_correct:
            moved = choose(problem.resists(logits), moved, x_adv)
        x_adv = moved
    return x_adv


def first_point(problem: Problem, random: bool) -> Tensor:
    """Starting point of the first run: the given start, a random point of the ball, or ``x``."""
    if problem.start is not None:
        return problem.threat.project(problem.x + problem.start, problem.x)
    return problem.random_start(0, STREAM) if random else problem.x


def pgd_with_restarts(
    problem: Problem,
    loss: Loss,
    *,
    alpha: float | None,
    steps: int,
    restarts: int,
    random: bool,
    only_correct: bool = False,
) -> Tensor:
    """Per sample the result of the first run that fools the model, else of the largest loss.

    Only the first run uses ``problem.start`` or, with ``random=False``, the image itself. Robust
    accuracy then counts a sample as wrong if any restart fools the model. A fooled sample keeps
    its result, so where reading a tensor does not stall a device it is not attacked again.
    """
    x_adv = pgd_loop(
        problem,
        first_point(problem, random),
        loss,
        alpha=alpha,
        steps=steps,
        only_correct=only_correct,
    )
    if restarts == 1:
        return x_adv
    fooled, largest = _outcome(problem, x_adv, loss)
    rows = torch.arange(len(x_adv), device=x_adv.device)
    for restart in range(1, restarts):
        if problem.net.syncs_are_free:
            rows = (~fooled).nonzero().squeeze(1)
            if len(rows) == 0:
                break
        part = problem.subset(rows)
        start = part.random_start(restart, STREAM)
        other = pgd_loop(part, start, loss, alpha=alpha, steps=steps, only_correct=only_correct)
        newly_fooled, new_loss = _outcome(part, other, loss)
        better = ~fooled[rows] & (newly_fooled | (new_loss > largest[rows]))
        x_adv[rows] = choose(better, other, x_adv[rows])
        largest[rows] = torch.where(better, new_loss, largest[rows])
        fooled[rows] = fooled[rows] | newly_fooled
    return x_adv


@torch.no_grad()
def _outcome(problem: Problem, x_adv: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """(B,) bool: the attack has succeeded at ``x_adv``; and (B,) losses there."""
    logits = problem.logits(x_adv)
    return ~problem.resists(logits), loss(logits, problem)
