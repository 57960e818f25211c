"""AutoAttack "standard" (Croce & Hein, 2020) through the package ``pyautoattack``, unchanged.

The cascade is APGD-CE, targeted APGD, targeted FAB, Square, each applied to the
samples the previous ones did not fool. Its published code draws random numbers for a whole batch,
so unlike in the other attacks the result for a sample depends on its batch.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastadv.errors import UserError
from fastadv.evaluation.attacks.names import AttackSpec
from fastadv.evaluation.attacks.problem import Problem
from fastadv.threat import Threat

NORMS = {"linf": "Linf", "l2": "L2"}
TARGETS = 9
MIN_CLASSES = 4


def require_package() -> None:
    """Raise ``UserError`` with the install command if ``pyautoattack`` is missing."""
    if importlib.util.find_spec("pyautoattack") is None:
        raise UserError(
            "The attack 'autoattack' needs the package pyautoattack; install it with: "
            "pip install 'fastadv[eval]'"
        )


def require_ball_in_the_unit_box(threat: Threat) -> None:
    """Raise ``UserError`` unless ``threat`` is what the package computes: one radius for all images
    and channels, in [0,1], without a mask or targets."""
    eps = threat.eps
    one_radius = not isinstance(eps, tuple) and not (isinstance(eps, Tensor) and eps.dim())
    if not one_radius or (threat.low, threat.high) != (0, 1):
        what = "one eps for all images and channels, and images in [0, 1]"
    elif threat.mask is not None or threat.targeted:
        what = "neither masks nor targeted threats"
    else:
        return
    raise UserError(f"AutoAttack takes {what}; use 'pgd-100-10' instead.")


def cascade(problem: Problem, spec: AttackSpec) -> Tensor:
    """The adversarial examples AutoAttack found; the image itself if it found none.

    With fewer than ten classes every wrong class is a target, instead of nine. Computed in
    float32, the only type the package supports. Raises ``UserError`` for fewer than four classes,
    because the targeted losses need four.
    """
    require_package()
    require_ball_in_the_unit_box(problem.threat)
    from pyautoattack import AutoAttack  # an optional package

    x, y = problem.x.float(), problem.y

    def model(images: Tensor) -> Tensor:
        return problem.logits(images.to(problem.x.dtype)).float()

    if x.dim() not in (2, 4):
        raise UserError(
            f"AutoAttack needs images (B,C,H,W) or vectors (B,D), not {tuple(x.shape)}; use "
            "'pgd-100-10' instead."
        )
    with torch.no_grad():
        classes = model(x).shape[1]
    if classes < MIN_CLASSES:
        raise UserError(
            f"AutoAttack's targeted attacks need at least {MIN_CLASSES} classes and the model has "
            f"{classes}; use 'pgd-100-10' instead."
        )
    adversary = AutoAttack(
        model, device=x.device, eps=float(problem.threat.eps), norm=NORMS[problem.threat.norm],
        seed=problem.seed,
    )  # fmt: skip
    targets = min(TARGETS, classes - 1)
    adversary.apgd_targeted.n_target_classes = targets
    adversary.fab.n_target_classes = targets
    with _contained(x.device):
        x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=len(x))
    x_adv = x_adv.detach().to(problem.x.dtype)
    # float32 rounds eps, so the result may lie just outside of a wider type's ball.
    return x_adv if x.dtype == problem.x.dtype else problem.threat.project(x_adv, problem.x)


@contextmanager
def _contained(device: torch.device) -> Iterator[None]:
    """Restore what the package changes process-wide: the random seeds and the trace function."""
    tracing = sys.gettrace()
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        sys.settrace(tracing)
