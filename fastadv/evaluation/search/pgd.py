"""PGD and the two attacks called CW as searches: steps of one size, projected."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.engine.noise import EVALUATION
from fastadv.evaluation.search import losses
from fastadv.evaluation.search.search import Images, Search, Seen, State, choose
from fastadv.threat import Radius, Threat


class Pgd(Search):
    """``steps`` steps of size ``alpha`` (``Threat.pgd_alpha``) from each of ``segments`` random
    points of the ball, upward on an objective.

    The last point of a run counts and no other, and the first run that fools the network ends the
    attack. With ``stopped`` the first point that fools it counts: no step moves the image from
    there. With ``largest`` the last point of the run with the largest cross entropy counts (of
    equal ones the last), and no other: all runs are made, and that point is looked at once more.
    With ``unclipped`` the random points may leave the range of images, in which every step ends.
    ``objective`` is a key of ``losses.OBJECTIVES``, "ce" by default, or "kl": KL(f(x) || f(x')).
    ``evaluation.attacks.pgd`` and ``pgd_with_restarts`` say which released code has which form.
    """

    name: ClassVar[str] = "pgd"
    summary: ClassVar[str] = (
        "steps of one size alpha, projected, upward on the cross entropy; the last point counts"
    )
    default_steps: ClassVar[int] = 10
    options: ClassVar[tuple[str, ...]] = ("alpha", "objective", "stopped", "largest", "unclipped")
    always_stops: ClassVar[bool] = False

    def __init__(
        self,
        threat: Threat,
        seed: int = 0,
        segments: int | None = None,
        steps: int | None = None,
        alpha: Radius | None = None,
        objective: str | None = None,
        *,
        stopped: bool = False,
        largest: bool = False,
        unclipped: bool = False,
    ) -> None:
        super().__init__(threat, seed, segments, steps)
        self.alpha = threat.pgd_alpha if alpha is None else alpha
        self.objective_name = objective or "ce"
        self.stops = stopped or self.always_stops
        self.largest = largest
        self.last_alone = largest or not self.stops
        self.remembers = ("best", "height") if largest else ()
        self.starts = threat.unboxed() if unclipped else threat

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
        state = {
            "point": self.starts.start(images.x, images.index, *draw),
            "iteration": torch.zeros(len(images.x), dtype=torch.int64, device=images.x.device),
        }
        if self.largest:  # of the runs so far: the last point of the one to be judged
            state["best"] = images.x
            state["height"] = torch.full_like(images.logits[:, 0], -float("inf"))
        return state

    def wants_gradient(self, state: State) -> Tensor:
        return state["iteration"] < self.steps

    def counts(self, state: State) -> Tensor | None:
        if self.largest:
            return state["iteration"] > self.steps
        return None if self.stops else state["iteration"] >= self.steps

    def objective(self, logits: Tensor, state: State) -> Tensor:
        if self.objective_name == "kl":
            return kernels.trades_kl(state["logits"], logits)
        loss = losses.OBJECTIVES[self.objective_name](logits, state["y"])
        return -loss if self.threat.targeted else loss

    def tell(self, state: State, seen: Seen) -> State:
        iteration = state["iteration"]
        moved = self.threat.step(state["point"], seen.gradient, state["x"], self.alpha)
        if self.largest:
            return self._compared(state, seen, moved)
        return {"point": moved, "iteration": iteration + 1, "done": iteration >= self.steps}

    def _compared(self, state: State, seen: Seen, moved: Tensor) -> State:
        """At the end of a run its point is compared with ``best``, to which the last run goes on:
        that is what counts."""
        iteration, point = state["iteration"], state["point"]
        ends = iteration == self.steps
        if self.stops:
            ends = ends | (seen.wrong & (iteration < self.steps))
        ends = ends & ~state["done"]
        loss = losses.ce(seen.logits, state["y"])
        height = -loss if self.threat.targeted else loss
        higher = ends & (height >= state["height"])
        best = choose(higher, point, state["best"])
        judged = ends & (state["segment"] + 1 >= self.segments)
        return {
            "point": choose(judged, best, moved),
            "iteration": (iteration + 1).masked_fill(judged, self.steps + 1),
            "best": best,
            "height": torch.where(higher, height, state["height"]),
            "done": (ends & ~judged) | (iteration > self.steps),
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
    options: ClassVar[tuple[str, ...]] = ("alpha", "stopped", "largest", "unclipped")

    def objective(self, logits: Tensor, state: State) -> Tensor:
        return losses.hinge(logits, state["y"], targeted=self.threat.targeted)


class CwMargin(Cw):
    """CW of Bag of Tricks (Pang et al., 2021): PGD-10 on the margin, which no longer moves an image
    once it is misclassified. So the first such point counts."""

    name: ClassVar[str] = "cw-margin"
    summary: ClassVar[str] = (
        "PGD on the margin of Bag of Tricks (Pang et al., 2021); the first success counts"
    )
    default_steps: ClassVar[int] = 10
    options: ClassVar[tuple[str, ...]] = ("alpha", "largest")
    always_stops: ClassVar[bool] = True

    def objective(self, logits: Tensor, state: State) -> Tensor:
        loss = losses.margin(logits, state["y"])
        return -loss if self.threat.targeted else loss
