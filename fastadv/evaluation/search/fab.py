"""FAB (Croce & Hein, 2020, "Minimally distorted adversarial examples with a fast adaptive boundary
attack"): steps to the nearest decision boundary of the linearised network, drawn to the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.engine.noise import RESTART, noise_stream
from fastadv.evaluation.search import losses
from fastadv.evaluation.search.norms import size, slope
from fastadv.evaluation.search.projections import onto_hyperplane
from fastadv.evaluation.search.search import Images, Search, Seen, State, by_image, choose

NEAREST = 0.1  # the largest weight of the image's own projection in a move
OVERSHOOT = 1.05  # a move goes this factor beyond the linearised boundary
BACK = 0.9  # of the way from the image to a point that fools the network, from which it goes on
LEAST_MOVE = 1e-8
START = noise_stream("evaluation.fab")


class _Fab(Search):
    """``steps`` moves. Each goes to the hyperplane on which the linearised objective is 0: to the
    projection of the point, mixed with that of the image. A point that fools the network but is
    outside the ball is drawn back to the image by a tenth of its distance.

    The published code goes on to minimise the distance of what it found and compares it with eps at
    the end. Here an image leaves at the first point inside the ball that fools the network, and
    points that were drawn back count too.

    Passes without and with a gradient take turns: of the new point, to see its label, and of the
    point that it is drawn back to. After nine moves of ten that is another point, so that taking
    the gradient with the label would mostly be in vain.

    ``settled``: the label at the point makes no difference any more, only its gradient does.
    """

    phases: ClassVar[tuple[bool, ...]] = (True, False)

    def start(self, images: Images, segment: int) -> State:
        n, device = len(images.x), images.x.device
        return {
            "point": images.x,
            "settled": torch.ones(n, dtype=torch.bool, device=device),
            "iteration": torch.zeros(n, dtype=torch.int64, device=device),
        }

    def wants_gradient(self, state: State) -> Tensor:
        return state["settled"]

    def counts(self, state: State) -> Tensor:
        away = (state["point"] - state["x"]).flatten(1)
        return size(self.threat.norm, away) <= self.threat.radius(away)

    def tell(self, state: State, seen: Seen) -> State:
        x, point, settled = state["x"], state["point"], state["settled"]
        onward = choose(seen.wrong, x + (point - x) * BACK, point)
        if seen.steep:
            onward = choose(settled, self._moved(x, point, seen.loss, seen.gradient), onward)
        return {
            "point": onward,
            "settled": ~settled,
            "iteration": state["iteration"] + settled,
            "done": ~settled & (state["iteration"] >= self.steps),
        }

    def _moved(self, x: Tensor, point: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        """The point after one move, (n,...)."""
        w = gradient.flatten(1)
        low, high = self.threat.ends(x)

        def projection(of: Tensor, excess: Tensor) -> Tensor:
            ends = ((end - of).flatten(1) for end in (low, high))
            return onto_hyperplane(self.threat.norm, w, excess, *ends)

        from_point = projection(point, loss)
        from_image = projection(x, loss + (w * (x - point).flatten(1)).sum(1))
        here, there = (
            size(self.threat.norm, move).clamp(min=LEAST_MOVE) for move in (from_point, from_image)
        )
        share = (here / (here + there)).clamp(max=NEAREST)
        share = by_image(share, x)
        stepped = point + OVERSHOOT * from_point.view_as(x)
        near = x + OVERSHOOT * from_image.view_as(x)
        moved = stepped * (1 - share) + near * share
        return self.threat.clip(moved.to(x.dtype))  # logits are in float32 at least


class Fab(_Fab):
    """Each move goes to the nearest boundary of all classes, which costs a backward pass for each
    of them. Run 0 begins at the image, the others at a random point half as far as eps. In a
    targeted threat the boundary is that to the target."""

    name: ClassVar[str] = "fab"
    summary: ClassVar[str] = (
        "to the nearest boundary of the linearised network; a backward pass for each class"
    )

    def start(self, images: Images, segment: int) -> State:
        state = super().start(images, segment)
        if segment:
            state["point"] = self._random_point(images, segment)
        return state

    def objective(self, logits: Tensor, state: State) -> Tensor:
        y = state["y"]
        if self.threat.targeted:
            return losses.of_class(logits, y) - losses.of_class(logits, state["logits"].argmax(1))
        return losses.margin(logits, y)

    def objectives(self, logits: Tensor, state: State) -> Sequence[Tensor]:
        if self.threat.targeted:
            return [self.objective(logits, state)]
        y = state["y"]
        true = losses.of_class(logits, y)
        others = range(logits.shape[1] - 1)  # class k, or the one after it from the label on
        return [losses.of_class(logits, k + (y <= k)) - true for k in others]

    def distance(self, loss: Tensor, gradient: Tensor) -> Tensor:
        return loss.abs() / (losses.TINY + slope(self.threat.norm, gradient))

    def _random_point(self, images: Images, segment: int) -> Tensor:
        x = images.x
        shape = tuple(x.shape[1:])
        draw: tuple[int, int, int] = (self.seed, START.shift + segment * RESTART, START.number)
        if self.threat.norm == "linf":
            noise = kernels.noise_uniform(images.index, shape, *draw, x.dtype)
        else:
            noise = kernels.noise_normal(images.index, shape, *draw, x.dtype)
        reach = by_image(size(self.threat.norm, noise), x) + losses.TINY
        return self.threat.clip(x + self.threat.radius(x) * noise / reach * 0.5)


class FabT(_Fab):
    """Towards one class after another: run number s goes to the boundary between the label and the
    class of rank s + 2 of the image's logits."""

    name: ClassVar[str] = "fab-t"
    summary: ClassVar[str] = "FAB towards one of the most likely classes after another"

    default_segments: ClassVar[int] = 9
    numbers: ClassVar[tuple[str, str]] = ("STEPS", "TARGETS")
    aims: ClassVar[bool] = True
    takes_targets: ClassVar[bool] = False

    def start(self, images: Images, segment: int) -> State:
        ranked = images.logits.argsort(dim=1, descending=True)
        return {**super().start(images, segment), "target": ranked[:, segment + 1]}

    def objective(self, logits: Tensor, state: State) -> Tensor:
        return losses.of_class(logits, state["target"]) - losses.of_class(logits, state["y"])
