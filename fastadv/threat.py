"""The threat model: which perturbations an attack may use, and how 8/255 is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.declared import NonNegative, check_fields, parse_number
from fastadv.errors import UserError, unknown

__all__ = ["NORMS", "USUAL_EPS", "Threat", "usual_threat"]

NORMS = ("linf", "l2")
USUAL_EPS = {"linf": 8 / 255, "l2": 128 / 255}
"""Default radius per norm, in pixels: that of the papers' CIFAR tables."""


def usual_threat(norm: str, eps: float | str | None = None) -> Threat:
    """The ball of ``norm``; ``eps`` in pixels, a number or "8/255"; None: ``USUAL_EPS``."""
    radius = USUAL_EPS.get(str(norm), 0.0) if eps is None else parse_number(eps, "eps")
    return Threat(norm, radius)


@dataclass(frozen=True)
class Threat:
    """The allowed perturbations: a ball of radius ``eps`` around each image, clipped to a box.

    ``norm`` is ``"linf"`` (default) or ``"l2"`` (per image, over all its values). ``eps``, ``low``
    and ``high`` are in pixel units; images and adversarial examples lie in ``[low, high]``, by
    default [0,1]. ``eps`` None is 8/255 in Linf and 128/255 in L2. Raises ``UserError`` for an
    unknown norm, a negative eps, and an eps in Linf above the range of a pixel.
    """

    norm: str = "linf"
    eps: NonNegative = None  # type: ignore[assignment]  # the usual one of the norm
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        if self.eps is None:
            object.__setattr__(self, "eps", USUAL_EPS[self.norm])
        check_fields(self, ("eps",))
        if self.norm == "linf" and self.eps > self.high - self.low:
            raise UserError(
                f"eps={self.eps:g} is more than the whole range of a pixel, [{self.low:g}, "
                f"{self.high:g}]; did you mean {self.eps:g}/255?"
            )

    def require_step(self, alpha: float | None) -> None:
        """Raise ``UserError`` if ``alpha`` is larger than the range of a pixel in Linf."""
        if self.norm == "linf" and alpha is not None and alpha > self.high - self.low:
            raise UserError(
                f"alpha={alpha:g} is more than the whole range of a pixel, [{self.low:g}, "
                f"{self.high:g}]; did you mean {alpha:g}/255?"
            )

    @property
    def pgd_alpha(self) -> float:
        """The step size of PGD in the papers: eps/4 in Linf (2/255 at 8/255), 15/128 eps in L2
        (15/255 at 128/255; locuslab/robust_overfitting)."""
        return self.eps * (1 / 4 if self.norm == "linf" else 15 / 128)

    def start(
        self, x: Tensor, index: Tensor, seed: int, offset: Tensor | int, stream: int = 0
    ) -> Tensor:
        """A random point of the ball around ``x`` (B,C,H,W), clipped to the box.

        Linf: uniform in the cube. L2: a Gaussian direction with a radius uniform in [0, eps]
        (not uniform in the ball; locuslab/robust_overfitting). Sample ``index[i]`` draws the same
        numbers in every batch; ``offset`` is the number of the draw.
        """
        draw = kernels.linf_start if self.norm == "linf" else kernels.l2_start
        return draw(x, self.eps, index, seed, offset, self.low, self.high, stream)

    def step(self, x_adv: Tensor, gradient: Tensor, x: Tensor, alpha: float | Tensor) -> Tensor:
        """One ascent step of size ``alpha``, projected to the ball around ``x`` and the box.

        Linf uses the sign of ``gradient``, L2 each sample's gradient divided by its norm; a zero
        gradient moves nothing.
        """
        move = kernels.linf_step if self.norm == "linf" else kernels.l2_step
        return move(x_adv, gradient, x, alpha, self.eps, self.low, self.high)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """``x_adv`` projected to the ball around ``x`` and clipped to the box."""
        project = kernels.linf_project if self.norm == "linf" else kernels.l2_project
        return project(x_adv, x, self.eps, self.low, self.high)

    def at_edge(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """(B,) bool: the gradient may only point out of the ball around ``x``. In Linf no pixel can
        move in both directions, and at least one is at the distance eps."""
        away = (x_adv - x).flatten(1)
        if self.norm == "l2":
            # Clipping to the box after the projection leaves some points inside the radius.
            return torch.linalg.vector_norm(away, dim=1) >= 0.9 * self.eps
        out, values = away.abs() >= self.eps * (1 - 1e-3), x_adv.flatten(1)
        return out.any(1) & (out | (values <= self.low) | (values >= self.high)).all(1)
