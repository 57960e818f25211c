"""LIET: one step from what the network takes for the image of a class (Pan et al., ICCV 2025)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from typing import ClassVar

import torch
from torch import Tensor

from fastadv.algorithms.adversaries.ascent import Ascent
from fastadv.algorithms.contract import Adversarial, Batch, Capabilities, Conflict, Context, Setup
from fastadv.algorithms.sample_state import require_size
from fastadv.algorithms.start_points import given, require_cube
from fastadv.declared import Count, Share, option
from fastadv.engine.gradient import gradients
from fastadv.engine.noise import NEIGHBOR, Stream, noise_stream
from fastadv.errors import UserError
from fastadv.threat import Threat

NOISE, MASK, RATIO, SIDE = map(noise_stream, ("liet.noise", "liet.mask", "liet.ratio", "liet.side"))
USUAL_EPS = 8 / 255  # up to here the published code projects to the ball
GREY = 0.5


class LIET(Ascent):
    """x' = box(ball(x0 + alpha sign grad)), x0 = box(x +- d), alpha = eps.

    d is eps I_y, where an element is noise U(-eps, eps) instead with a probability that is uniform
    in [``min_mask``, ``max_mask``]. This probability and the sign of d are drawn once per update. I
    (classes,C,H,W), the label information, is the sign of the gradient of the attack's loss at a
    grey image, for each class, in BatchNorm's eval mode; it is computed anew in the first of every
    ``renew_every`` updates of an epoch. Above eps = 8/255 the noise is U(-2 eps, 2 eps) and x' is
    not projected to the ball (fzjcdt/FastAT_Benchmark, fast_at/liet.py).

    The natural logits of other parts are those of x0, with which LIET compares: the attack's pass
    at x0 serves the outer loss also. The weakening of a perturbation is measured from x0. A given
    ``start`` is +-d.
    """

    takes_start: ClassVar[bool] = False
    hard_labels_only: ClassVar[str] = "its starts are images of one class"

    renew_every: Count = option(20, "updates after which the label information is computed anew")
    min_mask: Share = option(0.1, "smallest share of a start's elements that is noise")
    max_mask: Share = option(0.5, "largest share of a start's elements that is noise")

    information: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_mask > self.max_mask:
            raise UserError(
                f"min_mask must be at most max_mask, and {self.min_mask:g} is above "
                f"{self.max_mask:g}."
            )

    def requires(self) -> frozenset[str]:
        return super().requires() | {"class_logits"}

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if method.sample_state:
            yield Conflict(
                "this method",
                "LIET attacks one image per class, which is no sample, and a part here keeps a row "
                "per sample.",
            )

    def check_threat(self, threat: Threat) -> None:
        super().check_threat(threat)
        require_cube(threat)
        if threat.targeted:
            raise UserError(
                "LIET begins at images of the right class, so it cannot aim at another."
            )

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self._make_room()

    def _make_room(self) -> None:
        shape = (self.setup.num_classes, *self.setup.image_shape)
        self.information = torch.zeros(shape, device=self.setup.device, dtype=self.setup.dtype)
        self.state = {"label_information": self.information}

    def check_images(self, batch: Batch) -> None:
        require_size(batch.x, self.setup, "LIET keeps an image per class")

    def schedule(self, update: int, epoch: float) -> None:
        super().schedule(update, epoch)
        another = len(self.information) != self.setup.num_classes
        if another:
            self._make_room()
        place = update % (self.setup.steps_per_epoch or update + 1)
        if another or place % self.renew_every == 0:
            self._renew(update)

    def _renew(self, update: int) -> None:
        """Compute the label information. Outside of a recorded update, which would repeat it."""
        classes = torch.arange(len(self.information), device=self.setup.device)
        offset = torch.full_like(classes[0], update + NEIGHBOR)  # draws of no sample
        grey = torch.full_like(self.information, GREY)
        batch = Batch(grey, classes, classes, offset, self.setup.threat)
        context = self.setup.prepare_batch(batch, Context())
        self.net.structure.distrust()
        with self.net.attacking("eval"):
            slope, _ = self.net.run(self.gradient_at, grey, batch, context)
        self.net.copies.invalidate()
        found = torch.where(self.setup.sound(), slope.sign(), self.information)
        self.information.copy_(found)

    def _start(self, batch: Batch) -> Tensor:
        chosen = given(batch)
        if chosen is not None:
            return chosen
        threat = batch.threat
        ratio = self.min_mask + (self.max_mask - self.min_mask) * self._drawn_once(batch, RATIO)
        side = torch.where(self._drawn_once(batch, SIDE) < 0.5, -1.0, 1.0).to(batch.x.dtype)
        noise = self.uniform(batch, NOISE) * (2.0 if _is_wide(threat) else 1.0)
        masked = (self.uniform(batch, MASK) + 1) / 2 < ratio
        delta = torch.where(masked, noise, self.information[batch.y])
        return threat.clip(batch.x + threat.movable(side * threat.radius(batch.x) * delta))

    def _drawn_once(self, batch: Batch, stream: Stream) -> Tensor:
        """A number in [0,1), 0-dim, the same for all images of an update."""
        first = batch._replace(index=torch.zeros_like(batch.index[:1]))
        return (self.uniform(first, stream, (1,)).view(()) + 1) / 2

    def make(self, batch: Batch, context: Context) -> Adversarial:
        start = self._start(batch)
        x_adv = self.net.run(self._step, start, batch, context)
        return Adversarial(x_adv, start, context, start)

    def _step(self, start: Tensor, batch: Batch, context: Context) -> Tensor:
        gradient, _ = self.gradient_at(start, batch, context)
        return self._moved(start.detach(), gradient, batch)

    def _moved(self, start: Tensor, gradient: Tensor, batch: Batch) -> Tensor:
        threat = batch.threat.unbounded() if _is_wide(batch.threat) else batch.threat
        return threat.step(start, gradient, batch.x, self.step_size(batch))

    def shares_forward(self, method: Capabilities) -> bool:
        """See ``SharesForward.shares_forward``."""
        return self.attack_bn == "train" and not method.flat_attack_loss

    def joint_center(self, batch: Batch) -> Tensor | None:
        """See ``SharesForward.joint_center``."""
        return self._start(batch)

    def joint_step(
        self, center: Tensor, logits: Tensor, batch: Batch, context: Context
    ) -> tuple[Tensor, Tensor]:
        """See ``SharesForward.joint_step``."""
        loss = self.setup.attack_loss(logits, batch.attacked_y, context)
        (gradient,) = gradients(loss, [center], keep_graph=True)
        return self._moved(center.detach(), gradient, batch), gradient


def _is_wide(threat: Threat) -> bool:
    return threat.nominal > USUAL_EPS * (1 + 1e-6)
