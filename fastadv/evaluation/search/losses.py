"""Objectives of searches: functions (n,) of logits (n,classes), which are maximised."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastadv.errors import UserError
from fastadv.threat import Threat

TINY = 1e-12
KAPPA = 10.0


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """The cross entropy (n,) with the classes ``y`` (n,), or with soft labels (n,classes)."""
    return cross_entropy(logits, y, reduction="none")


def is_class(y: Tensor, logits: Tensor) -> Tensor:
    """(n,classes) bool: true at the class ``y`` (n,) of each row of ``logits`` (n,classes)."""
    return y[:, None] == torch.arange(logits.shape[1], device=y.device)


def of_class(logits: Tensor, y: Tensor) -> Tensor:
    """The logits (n,) of the classes ``y`` (n,)."""
    # Not gather: the summation order of its backward is not deterministic on CUDA.
    return logits.masked_fill(~is_class(y, logits), 0.0).sum(1)


def own_and_other(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (n,) of the classes ``y`` (n,), and the largest of the other classes."""
    others = logits.masked_fill(is_class(y, logits), -float("inf"))
    return of_class(logits, y), others.amax(1)


def lead(logits: Tensor, y: Tensor) -> Tensor:
    """z_y - max_{j != y} z_j: above 0 where class y wins. The margin of a verdict."""
    own, other = own_and_other(logits, y)
    return own - other


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y (Carlini & Wagner, 2017, f6): above 0 where another class wins."""
    own, other = own_and_other(logits, y)
    return other - own


def hinge(logits: Tensor, y: Tensor, *, targeted: bool = False) -> Tensor:
    """-relu(z_y - max(max_{j != y} z_j, 0) + 10) (Carlini & Wagner, 2017, as released with RWP,
    whose code finds the largest other logit after it has set z_y to 0); if ``targeted``, the
    difference has the other sign."""
    ahead = of_class(logits, y) - logits.masked_fill(is_class(y, logits), 0.0).amax(1)
    return -((-ahead if targeted else ahead) + KAPPA).relu()


def probability_margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} p_j - p_y, p the softmax of the logits (Xie et al., 2024, Eq. 4)."""
    return margin(logits.softmax(1), y)


def logit_scaled(logits: Tensor, y: Tensor) -> Tensor:
    """The cross entropy of z/(z_1 - z_2), z_1 >= z_2 >= ..., the divisor taken as a constant (Yu &
    Xu, 2023, MIFPE with t = 1): so that large logits do not saturate the softmax."""
    top = logits.detach().topk(2, dim=1).values
    return ce(logits / (top[:, :1] - top[:, 1:] + TINY), y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """-(z_y - max_{j != y} z_j)/(z_1 - z_3), z_1 >= z_2 >= ... (Croce & Hein, 2020, Eq. 6): the
    difference of logits ratio, which no scaling of the logits changes. Needs three classes."""
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + TINY)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """-(z_y - z_t)/(z_1 - (z_3 + z_4)/2) (Croce & Hein, 2020, Eq. 7). Needs four classes."""
    top = logits.topk(4, dim=1).values
    scale = top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + TINY
    return -(of_class(logits, y) - of_class(logits, target)) / scale


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": ce,
    "margin": margin,
    "dlr": dlr,
    "logit-scaled": logit_scaled,
    "probability-margin": probability_margin,
}
"""What PGD can maximise by name, functions of logits and y; and "kl", of the logits of x."""


def check(objective: object, threat: Threat, classes: int) -> None:
    """Raise ``UserError`` if PGD cannot follow the ``objective`` on a network of ``classes``."""
    if objective == "kl" and threat.targeted:
        raise UserError(
            "objective='kl' leads away from the prediction at the image and to no target; use "
            "objective='ce' for a targeted attack."
        )
    if objective == "dlr" and classes < 3:
        raise UserError(
            f"objective='dlr' needs at least 3 classes and the model has {classes}; use "
            "objective='margin'."
        )
