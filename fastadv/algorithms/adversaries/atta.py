"""ATTA-K: attacks that continue from the end of the previous epoch's (Zheng et al., 2020)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor

from fastadv.algorithms.adversaries.ascent import Ascent
from fastadv.algorithms.contract import Adversarial, Batch, Capabilities, Conflict, Context
from fastadv.declared import Passes, option
from fastadv.threat import Threat

PUBLISHED_ALPHA = {10: 0.007, 3: 0.01, 1: 0.015}  # from this many steps on, at eps = 0.031
PUBLISHED_EPS = 0.031


class ATTA(Ascent):
    """``steps`` steps from a stored start: the adversarial image of the sample's previous epoch.

    alpha is 0.015, 0.01, 0.007 of 0.031 for 1, 3 and 10 steps, in units of eps. The attack runs
    with BatchNorm's running statistics.
    """

    attack_bn: Literal["train", "eval"] = option("eval", "mode of BatchNorm during the attack")
    steps: Passes = option(1, "steps of the attack")

    @property
    def gradient_steps(self) -> int:
        return self.steps

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        yield from super().conflicts(method)
        if not method.keeps_starts:
            yield Conflict(
                "start", "ATTA continues from stored perturbations: take start='stored'."
            )

    def usual_step(self, threat: Threat) -> float | Tensor:
        published = next(alpha for steps, alpha in PUBLISHED_ALPHA.items() if self.steps >= steps)
        return threat.of_eps(published / PUBLISHED_EPS)

    def make(self, batch: Batch, context: Context) -> Adversarial:
        x_adv = start = self.begin(batch)
        for _ in range(self.steps):
            x_adv = self.net.run(self.ascend, x_adv, batch.x, batch, context)
        return Adversarial(x_adv, batch.x, context, start)
