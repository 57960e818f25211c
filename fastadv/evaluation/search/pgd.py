"""PGD and the two attacks called CW as searches: steps of one size, projected."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.engine.noise import EVALUATION
from fastadv.evaluation.search import losses
from fastadv.evaluation.search.search import Images, Search, Seen, State
from fastadv.threat import Radius, Threat


class Pgd(Search):
    """``steps`` steps of size ``alpha`` (``Threat.pgd_alpha``) from each of ``segments`` random
    points of the ball, upward on an objective.

    The last point of a run counts and no other, as in the tables of MEM, TRADES and APART.
    ``objective`` is a key of
    ``losses.OBJECTIVES``, "ce" by default, or "kl": KL(f(x) || f(x')).
    """

    name: ClassVar[str] = "pgd"
    summary: ClassVar[str] = (
        "steps of one size alpha, projected, upward on the cross entropy; the last point counts"
    )
    default_steps: ClassVar[int] = 10
    options: ClassVar[tuple[str, ...]] = ("alpha", "objective")
    last_alone: ClassVar[bool] = True

    def __init__(
        self,
        threat: Threat,
        seed: int = 0,
        segments: int | None = None,
        steps: int | None = None,
        alpha: Radius | None = None,
        objective: str | None = None,
    ) -> None:
        super().__init__(threat, seed, segments, steps)
        self.alpha = threat.pgd_alpha if alpha is None else alpha
        self.objective_name = objective or "ce"

    @classmethod
    def check(cls, threat: Threat, name: str) -> None:
        """Every threat will do."""

    @classmethod
    def of(
        cls,
        threat: Threat,
        seed: int,
        classes: int,
        steps: int | None,
        segments: int | None,
        **options: Any,
    ) -> Search:
        losses.check(options.get("objective"), threat, classes)
        return super().of(threat, seed, classes, steps, segments, **options)

    def start(self, images: Images, segment: int) -> State:
        draw = (self.seed, segment, EVALUATION)
        return {
            "point": self.threat.start(images.x, images.index, *draw),
            "iteration": torch.zeros(len(images.x), dtype=torch.int64, device=images.x.device),
        }

    def wants_gradient(self, state: State) -> Tensor:
        return state["iteration"] < self.steps

    def counts(self, state: State) -> Tensor | None:
        return state["iteration"] >= self.steps

    def objective(self, logits: Tensor, state: State) -> Tensor:
        if self.objective_name == "kl":
            return kernels.trades_kl(state["logits"], logits)
        loss = losses.OBJECTIVES[self.objective_name](logits, state["y"])
        return -loss if self.threat.targeted else loss

    def tell(self, state: State, seen: Seen) -> State:
        iteration = state["iteration"]
        return {
            "point": self.threat.step(state["point"], seen.gradient, state["x"], self.alpha),
            "iteration": iteration + 1,
            "done": iteration >= self.steps,
        }

    def strength(self, seen: Seen, margin: Tensor) -> Tensor:
        return seen.loss


class Cw(Pgd):
    """CW of RWP and AWP: PGD on ``losses.hinge``."""

    name: ClassVar[str] = "cw"
    summary: ClassVar[str] = (
        "PGD on the margin of RWP and AWP, -relu(z_y - max(other logits, 0) + 10)"
    )
    default_steps: ClassVar[int] = 100
    options: ClassVar[tuple[str, ...]] = ("alpha",)

    def objective(self, logits: Tensor, state: State) -> Tensor:
        return losses.hinge(logits, state["y"], targeted=self.threat.targeted)


class CwMargin(Cw):
    """CW of Bag of Tricks (Pang et al., 2021): PGD on the margin, which no longer moves an image
    once it is misclassified. So the first such point counts."""

    name: ClassVar[str] = "cw-margin"
    summary: ClassVar[str] = (
        "PGD on the margin of Bag of Tricks (Pang et al., 2021); the first success counts"
    )
    last_alone: ClassVar[bool] = False

    def objective(self, logits: Tensor, state: State) -> Tensor:
        loss = losses.margin(logits, state["y"])
        return -loss if self.threat.targeted else loss

    def counts(self, state: State) -> None:
        return None
