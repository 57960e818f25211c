"""FGSM-R: one step of eps from a random start (AdvLC paper, Sec. 4)."""

from typing import ClassVar

from fastadv.algorithms.adversaries.fast import Fast


class FGSMR(Fast):
    """F+FGSM with alpha = eps instead of 1.25 eps; the ball stays around the clean image."""

    usual_alpha: ClassVar[float] = 1.0
