"""The loop all gradient attacks share: projected steps, repeated from several starting points."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.user_loss import require_values
from fastadv.errors import UserError
from fastadv.evaluation.attacks.names import AttackSpec
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


def first_point(problem: Problem, random: bool, *, clipped: bool = True) -> Tensor:
    """Starting point of the first run: the given start, a random point of the ball, or ``x``. Only
    if ``clipped`` is it clipped to the range of images."""
    if problem.start is not None:
        threat = problem.threat if clipped else problem.threat.unboxed()
        return threat.project(problem.x + problem.start, problem.x)
    return problem.random_start(0, STREAM, clipped=clipped) if random else problem.x


def pgd_with_restarts(
    problem: Problem, loss: Loss, spec: AttackSpec, *, steps: int, stopped: bool = False
) -> Tensor:
    """PGD with the start, the step and the ``restarts`` of ``spec``; ``steps`` of a run, and
    ``stopped``, are those of the attack.

    Per sample the result of the first run that fools the model, else of the largest loss. Robust
    accuracy then counts a sample as wrong if any restart fools the model: the usual worst case,
    which is also that of AutoAttack. A fooled sample keeps its result, so where reading a tensor
    does not stall a device it is not attacked again.

    If ``spec.largest``, per sample the result of the run with the largest cross entropy (or
    criterion), of equal ones the last, whatever the loss of the attack: so RWP and AWP
    (eval_pgd.py), and with ``stopped`` fast_adversarial (utils.py) and Bag of Tricks
    (utils_plus.py). It may be a run that does not fool the model where another one does, so the
    accuracy is the same or higher: 69.44 in place of 69.17 % for ``pgd-10-5`` in a check of 360
    images. More so if ``stopped``: a run that stops just beyond the boundary has a small loss.
    Every sample takes all runs.

    Only the first run uses ``problem.start`` or, with ``random_start=False``, the image itself.
    """
    run = partial(
        pgd_loop, loss=loss, alpha=spec.alpha, steps=steps, only_correct=stopped or spec.stopped
    )
    clipped = not spec.unclipped
    x_adv = run(problem, first_point(problem, spec.random_start is not False, clipped=clipped))
    restarts = range(1, spec.restarts or 1)
    if not restarts:
        return x_adv
    judged = ce if spec.largest else loss
    fooled, largest = _outcome(problem, x_adv, judged)
    rows = torch.arange(len(x_adv), device=x_adv.device)
    for restart in restarts:
        if problem.net.syncs_are_free and not spec.largest:
            rows = (~fooled).nonzero().squeeze(1)
            if len(rows) == 0:
                break
        part = problem.subset(rows)
        other = run(part, part.random_start(restart, STREAM, clipped=clipped))
        newly_fooled, new_loss = _outcome(part, other, judged)
        if spec.largest:
            better = new_loss >= largest[rows]
        else:
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
