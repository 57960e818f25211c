"""The threat model: which perturbations an attack may use, and how 8/255 is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.declared import NonNegative, check_fields, parse_number
from fastadv.errors import UserError, unknown

__all__ = ["NORMS", "USUAL_EPS", "Threat", "parse_number", "usual_threat"]

NORMS = ("linf", "l2")
USUAL_EPS = {"linf": 8 / 255, "l2": 128 / 255}
"""The radius of the papers' CIFAR tables: what is meant where nobody says one."""


def usual_threat(norm: str, eps: float | str | None = None) -> Threat:
    """The ball of ``norm``; ``eps`` in pixels, a number or "8/255", None: the usual one."""
    radius = USUAL_EPS.get(str(norm), 0.0) if eps is None else parse_number(eps, "eps")
    return Threat(norm, radius)


@dataclass(frozen=True)
class Threat:
    """A ball of radius ``eps`` around each image, cut to the box ``[low, high]``.

    ``norm`` is ``"linf"`` or ``"l2"`` (the L2 norm is taken per image over all its values);
    ``eps``, ``low`` and ``high`` are in pixel units, images live in ``[low, high]``.
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
        """Raise ``UserError`` for a step that was not meant in pixel units."""
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
        """A random point of the ball around ``x`` (B,C,H,W), cut to the box.

        Linf: uniform in the cube. L2: a Gaussian direction with a radius uniform in [0, eps]
        (not uniform in the ball; locuslab/robust_overfitting). Sample ``index[i]`` draws the same
        numbers whatever batch it is in; ``offset`` is the number of the draw.
        """
        draw = kernels.linf_start if self.norm == "linf" else kernels.l2_start
        return draw(x, self.eps, index, seed, offset, self.low, self.high, stream)

    def step(self, x_adv: Tensor, gradient: Tensor, x: Tensor, alpha: float | Tensor) -> Tensor:
        """One ascent step of size ``alpha``, projected to the ball around ``x`` and the box.

        Linf moves along the sign of ``gradient``, L2 along its direction per sample; a zero
        gradient moves nothing.
        """
        move = kernels.linf_step if self.norm == "linf" else kernels.l2_step
        return move(x_adv, gradient, x, alpha, self.eps, self.low, self.high)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The point of the ball around ``x``, cut to the box, for ``x_adv``."""
        project = kernels.linf_project if self.norm == "linf" else kernels.l2_project
        return project(x_adv, x, self.eps, self.low, self.high)

    def at_edge(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Which images (B,) lie where a gradient may point out of the ball around ``x`` only: in
        Linf no pixel is free to move both ways, and some are as far out as the ball allows."""
        away = (x_adv - x).flatten(1)
        if self.norm == "l2":
            # The box cuts what was projected, so that the way out ends short of the radius.
            return torch.linalg.vector_norm(away, dim=1) >= 0.9 * self.eps
        out, values = away.abs() >= self.eps * (1 - 1e-3), x_adv.flatten(1)
        return out.any(1) & (out | (values <= self.low) | (values >= self.high)).all(1)
