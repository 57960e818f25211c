"""Checks of the gradient: it is not zero, the loss has not run out of numbers, and it is true."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.evaluation.attacks.problem import Problem
from fastadv.evaluation.sanity import rivals, strength
from fastadv.evaluation.sanity.chance import counted, is_above
from fastadv.evaluation.sanity.finding import Finding
from fastadv.evaluation.sanity.trial import Trial
from fastadv.evaluation.search import losses

MASKED = 0.01  # the share of images whose gradient may be zero, or whose loss may be
UNTRUE = 0.05  # the share of images whose loss may change otherwise than the gradient says
STRIDES = (1 / 4, 1 / 16, 1 / 64)  # of eps: a network bends within large strides and rounds small
RATIOS = (0.5, 2.0)  # of the change of the loss to what the gradient says
ROUNDINGS = 64  # of the largest logit: changes below are not measured


def not_zero(trial: Trial) -> Finding:
    """The gradient of the cross entropy at the images is not exactly zero."""
    gradient, _ = trial.gradient(trial.x)
    flat = int((gradient.flatten(1).abs().amax(1) == 0).sum())
    passed = not is_above(flat, len(trial), MASKED)
    sentence = f"the gradient is exactly zero for {counted(flat, len(trial))}"
    if not passed:
        sentence += "; the network hides it (rounding, saturation), and no attack can follow it"
    return Finding("gradient", passed, sentence, {"zero": flat, "of": len(trial)})


def not_saturated(trial: Trial) -> Finding:
    """Where the loss is exactly zero after PGD, its softmax has no number left to tell of progress;
    no other gradient attack, whose loss is another, fools the network there."""
    rivals.white_box(trial)
    found = strength.longest(trial)
    loss = torch.nn.functional.cross_entropy(found.logits, trial.y, reduction="none")
    zero = found.right & (loss == 0)
    saturated, hidden, n = int(zero.sum()), int((zero & ~trial.standing).sum()), len(trial)
    passed = not is_above(hidden, n, MASKED)
    sentence = (
        f"after {strength.LONGEST} the loss is exactly zero for {counted(saturated, n)}, of which "
        f"other gradient attacks fool {hidden}"
    )
    if not passed:
        sentence += "; the softmax is saturated, and its loss shows the attack no way"
    return Finding("loss", passed, sentence, {"saturated": saturated, "hidden": hidden, "of": n})


def true(trial: Trial) -> Finding:
    """Along its own step the gradient predicts how the loss changes, over a part of eps.

    The loss is the log odds of an error, log sum_{j != y} exp z_j - z_y: the cross entropy is an
    increasing function of it, and it does not saturate. It is measured at both ends of the step,
    ahead and behind, in the box.
    """
    threat, x, n = trial.threat, trial.x, len(trial)
    if trial.coarse:
        sentence = "differences of the loss are below the rounding of a 16-bit type"
        return Finding("slope", None, sentence, {"of": n})
    gradient, logits = trial.gradient(x, log_odds)
    rounding = ROUNDINGS * torch.finfo(logits.dtype).eps * logits.abs().amax(1).double()
    agrees = torch.zeros(n, dtype=torch.bool, device=logits.device)
    for stride in STRIDES:
        ball = threat.scaled(stride)
        ahead, behind = (ball.step(x, way * gradient, x, ball.eps) for way in (1, -1))
        change = odds(trial.seen(ahead), trial.y) - odds(trial.seen(behind), trial.y)
        said = (gradient.double() * (ahead.double() - behind.double())).flatten(1).sum(1)
        ratio = change / said
        agrees |= (change.abs() > rounding) & (ratio > RATIOS[0]) & (ratio < RATIOS[1])
    untrue = n - int(agrees.sum())
    passed = not is_above(untrue, n, UNTRUE)
    sentence = f"along its step the gradient is wrong by more than half for {counted(untrue, n)}"
    if not passed:
        sentence += (
            "; the loss is in steps or flat, or its backward pass belongs to another function"
        )
    return Finding("slope", passed, sentence, {"untrue": untrue, "of": n})


def log_odds(logits: Tensor, problem: Problem) -> Tensor:
    return odds(logits, problem.y)


def odds(logits: Tensor, y: Tensor) -> Tensor:
    """The log odds (n,) of an error, in float64: logits (n,classes) lose no digit in it."""
    wide = logits.double()
    others = wide.masked_fill(losses.is_class(y, wide), -float("inf")).logsumexp(1)
    return others - losses.of_class(wide, y)
