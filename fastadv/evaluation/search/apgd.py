"""Auto-PGD (Croce & Hein, 2020, Alg. 1): projected steps with momentum, whose size is halved for
images on which they do not help."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.engine.noise import RESTART, noise_stream
from fastadv.evaluation.search import losses
from fastadv.evaluation.search.norms import direction, length
from fastadv.evaluation.search.search import Images, Search, Seen, State, by_image, choose
from fastadv.threat import Threat

MOMENTUM = 0.75  # the share of the new step in a move; the rest is the move before
RISING = 0.75  # the share of steps that must raise the loss
START = noise_stream("evaluation.apgd")


class Apgd(Search):
    """``steps`` moves from each of ``segments`` random points, upward on an objective.

    The first move has the size 2 eps. At checkpoints the size is halved, and the image goes back to
    its best point, if fewer than 75 % of the moves since the last checkpoint raised the loss, or if
    the size was kept there and the best loss is still the same.
    """

    def __init__(
        self,
        threat: Threat,
        seed: int = 0,
        segments: int | None = None,
        steps: int | None = None,
    ) -> None:
        super().__init__(threat, seed, segments, steps)
        self._periods = torch.tensor(periods(self.steps))

    def start(self, images: Images, segment: int) -> State:
        x, n = images.x, len(images.x)
        self._periods = self._periods.to(x.device)  # not in a step, which may be recorded
        point = random_surface_point(self.threat, images, self.seed, segment)
        zeros = torch.zeros(n, dtype=images.logits.dtype, device=x.device)
        return {
            "point": point,
            "before": point,
            "best": point,
            "best_gradient": torch.zeros_like(x),
            "best_loss": zeros - float("inf"),
            "best_loss_at_check": zeros,
            # The published code compares the first loss with an entry that is still 0.
            "loss_before": zeros,
            "rising": zeros,
            "size": 2 * self.threat.nominal * torch.ones_like(zeros),
            "was_halved": torch.ones(n, dtype=torch.bool, device=x.device),
            "iteration": torch.zeros(n, dtype=torch.int64, device=x.device),
        }

    def wants_gradient(self, state: State) -> Tensor:
        return state["iteration"] < self.steps

    def tell(self, state: State, seen: Seen) -> State:
        loss, iteration, gradient = seen.loss, state["iteration"], seen.gradient
        first = iteration == 0
        better = loss > state["best_loss"]
        best = choose(better, state["point"], state["best"])
        best_gradient = choose(better, gradient, state["best_gradient"])
        best_loss = torch.where(better, loss, state["best_loss"])
        at_check = torch.where(first, best_loss, state["best_loss_at_check"])

        rising = state["rising"] + (~first & (loss > state["loss_before"]))
        loss_before = torch.where(first, state["loss_before"], loss)
        period = self._periods[iteration.clamp(max=self.steps)]  # moves since the last check, or 0
        checks = period > 0
        stuck = ~state["was_halved"] & (at_check >= best_loss)
        halves = checks & ((rising <= period * RISING) | stuck)
        point = choose(halves, best, state["point"])
        gradient = choose(halves, best_gradient, gradient)
        size = torch.where(halves, state["size"] / 2, state["size"])
        moved = self._moved(state["x"], point, state["before"], gradient, size, first)
        return {
            "point": moved,
            "before": point,
            "best": best,
            "best_gradient": best_gradient,
            "best_loss": best_loss,
            "best_loss_at_check": torch.where(checks, best_loss, at_check),
            "loss_before": loss_before,
            "rising": torch.where(checks, 0.0, rising),
            "size": size,
            "was_halved": torch.where(checks, halves, state["was_halved"]),
            "iteration": iteration + 1,
            "done": iteration >= self.steps,
        }

    def _moved(
        self,
        x: Tensor,
        point: Tensor,
        before: Tensor,
        gradient: Tensor,
        size: Tensor,
        first: Tensor,
    ) -> Tensor:
        """The point after one move with momentum, which the first move has not."""
        size = by_image(size, x).to(x.dtype)
        if self.threat.norm == "linf":
            stepped = point + size * gradient.sign()
        else:
            stepped = point + size * direction(gradient)
        stepped = projected(self.threat, stepped, x)
        share = by_image(torch.where(first, 1.0, MOMENTUM), x).to(x.dtype)
        return projected(
            self.threat, point + (stepped - point) * share + (point - before) * (1 - share), x
        )


class ApgdCe(Apgd):
    """Auto-PGD on the cross entropy; in a targeted threat on that of the target, which falls."""

    name: ClassVar[str] = "apgd-ce"
    summary: ClassVar[str] = (
        "Auto-PGD, whose step adapts, on the cross entropy (Croce & Hein, 2020)"
    )

    def objective(self, logits: Tensor, state: State) -> Tensor:
        loss = losses.ce(logits, state["y"])
        return -loss if self.threat.targeted else loss


class ApgdDlr(Apgd):
    """Auto-PGD on the difference of logits ratio; in a targeted threat on that of the target to the
    class which the network gives to the image."""

    name: ClassVar[str] = "apgd-dlr"
    summary: ClassVar[str] = "Auto-PGD on the difference of logits ratio"
    least_classes: ClassVar[int] = 3

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
        made = super().of(threat, seed, classes, steps, segments, **options)
        if threat.targeted:  # the targeted ratio has four logits
            ApgdT.of(threat, seed, classes, steps, segments)
        return made

    def objective(self, logits: Tensor, state: State) -> Tensor:
        if self.threat.targeted:
            return losses.dlr_targeted(logits, state["logits"].argmax(1), state["y"])
        return losses.dlr(logits, state["y"])


class ApgdT(Apgd):
    """Auto-PGD towards one class after another: run number s aims at the class of rank s + 2 of the
    image's logits."""

    name: ClassVar[str] = "apgd-t"
    summary: ClassVar[str] = (
        "Auto-PGD on the targeted ratio, towards one of the most likely classes after another"
    )
    default_segments: ClassVar[int] = 9
    numbers: ClassVar[tuple[str, str]] = ("STEPS", "TARGETS")
    aims: ClassVar[bool] = True
    takes_targets: ClassVar[bool] = False
    least_classes: ClassVar[int] = 4

    def start(self, images: Images, segment: int) -> State:
        ranked = images.logits.argsort(dim=1, descending=True)
        return {**super().start(images, segment), "target": ranked[:, segment + 1]}

    def objective(self, logits: Tensor, state: State) -> Tensor:
        return losses.dlr_targeted(logits, state["y"], state["target"])


def periods(steps: int) -> list[int]:
    """For each iteration 0..steps, the number of moves since the last checkpoint if it is one, or
    0. Checkpoints come sooner and sooner (Croce & Hein, 2020, Sec. 3: 0.22, 0.03 and 0.06 of the
    steps)."""
    period, shorter, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    found, since = [0], 0
    for _ in range(steps):
        since += 1
        found.append(period if since == period else 0)
        if since == period:
            since, period = 0, max(period - shorter, least)
    return found


def random_surface_point(threat: Threat, images: Images, seed: int, segment: int) -> Tensor:
    """A random point (n,C,H,W) on the surface of the ball around each image, clipped to the box."""
    x = images.x
    draw: tuple[int, int, int] = (seed, START.shift + segment * RESTART, START.number)
    if threat.norm == "linf":
        noise = kernels.noise_uniform(images.index, tuple(x.shape[1:]), *draw, x.dtype)
        noise = noise / by_image(noise.flatten(1).abs().amax(1) + losses.TINY, x)
    else:
        noise = direction(kernels.noise_normal(images.index, tuple(x.shape[1:]), *draw, x.dtype))
    return threat.clip(x + threat.radius(x) * noise)


def projected(threat: Threat, moved: Tensor, x: Tensor) -> Tensor:
    """``moved`` (n,...) in the ball around ``x``, then in the box; as the published code rounds."""
    radius = threat.radius(x)
    if threat.norm == "linf":
        return threat.clip(torch.minimum(torch.maximum(moved, x - radius), x + radius))
    away = moved - x
    shorter = by_image(length(away), x).clamp(max=radius)
    return threat.clip(x + direction(away) * shorter)
