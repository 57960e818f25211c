"""FGSM-UAP and FGSM-CUAP: one step from a perturbation that all images, or all of a class, share
(Pan et al., AAAI 2024)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastadv.algorithms.adversaries.ascent import Ascent
from fastadv.algorithms.contract import (
    Adversarial,
    Batch,
    Context,
    Outcome,
    Setup,
)
from fastadv.algorithms.sample_state import require_size
from fastadv.algorithms.start_points import given, random_signs, require_cube
from fastadv.declared import NonNegative, option
from fastadv.engine.noise import noise_stream
from fastadv.threat import Threat

INITIAL = noise_stream("fgsm-uap.initial")
SHARED, MOMENTA = "universal", "universal_momenta"


class FGSMUAP(Ascent):
    """x' = box(ball(x0 + alpha sign g)), x0 = box(ball(x + eps u)), g the gradient at x0, alpha =
    eps; then u <- clamp(u + s sign m, +-s), m <- mean of g/|g|_1 + ``momentum_decay`` m.

    |g|_1 is over the whole batch, the mean over its images. u and m, (groups,C,H,W), are kept from
    batch to batch; u begins as +-s with random signs, m as 0. s is ``universal_scale``, 10/8: the
    published 10/255 at eps 8/255 (fzjcdt/FastAT_Benchmark, fast_at/fgsm_uap.py, where the decay is
    0.3 whatever the configuration says). With several processes each has its own u and m.

    In m the published code has g as it is after the update's backward pass, which has added the
    gradient of the regularizer at x0 to it; the step to x' is without (``momentum_of`` "update").
    "attack" is g alone, as the formula above. They differ beside ``start-and-end``.
    """

    takes_start: ClassVar[bool] = False
    rank_local_state: ClassVar[tuple[str, ...]] = (SHARED, MOMENTA)

    universal_scale: NonNegative = option(
        1.25, "size of the shared perturbation's elements, in units of eps"
    )
    momentum_decay: NonNegative = option(0.3, "factor of the stored momentum in each update")
    momentum_of: Literal["update", "attack"] = option(
        "update", "loss whose gradient at the start the momentum follows"
    )

    def requires(self) -> frozenset[str]:
        of_update = self.momentum_of == "update"
        return super().requires() | (frozenset({"start_gradient"}) if of_update else frozenset())

    def groups(self) -> int:
        """The number of shared perturbations."""
        return 1

    def assigned(self, batch: Batch, context: Context) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The number (B,) of the perturbation of each image, the point (B,C,H,W) to which it is
        added, and the new values of a subclass's own state: what follows the first two names of
        ``rank_local_state``."""
        return torch.zeros_like(batch.index), batch.x, ()

    def refuses_accumulation(self) -> str:
        return "every call continues from the perturbation of the call before"

    def check_threat(self, threat: Threat) -> None:
        super().check_threat(threat)
        require_cube(threat)

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self._make_room()

    def _make_room(self) -> None:
        shared = random_signs(self.groups(), self.setup, INITIAL) * self.universal_scale
        self.state = {SHARED: shared, MOMENTA: torch.zeros_like(shared)}

    def schedule(self, update: int, epoch: float) -> None:
        super().schedule(update, epoch)
        if len(self.state[SHARED]) != self.groups():
            self._make_room()

    def check_images(self, batch: Batch) -> None:
        require_size(batch.x, self.setup, "This attack keeps perturbations")

    def make(self, batch: Batch, context: Context) -> Adversarial:
        group, point, others = self.assigned(batch, context)
        start, threat = given(batch), batch.threat
        if start is None:
            shared = self.state[SHARED][group]
            start = threat.project(point + threat.movable(threat.radius(batch.x) * shared), batch.x)
        x_adv, gradient = self.net.run(self._step, start, batch, context)
        own = (gradient, group, *others)
        return Adversarial(x_adv, batch.x, context._replace(own=own), start)

    def _step(self, start: Tensor, batch: Batch, context: Context) -> tuple[Tensor, Tensor]:
        """x_adv, and the gradient at the start; a region."""
        gradient, _ = self.gradient_at(start, batch, context)
        x_adv = self.moved(start.detach(), gradient, batch.x, batch)
        return x_adv, gradient / self.net.loss_scale(len(batch.x))

    @torch.no_grad()
    def after(self, outcome: Outcome, ok: Tensor) -> None:
        gradient, group, *others = outcome.attacked.context.own
        if outcome.input_gradient is not None:
            gradient = gradient + outcome.input_gradient
        own = (*self._followed(gradient, group), *others)
        for kept, value in zip(self.state.values(), own, strict=True):
            kept.copy_(torch.where(ok, value, kept))

    def _followed(self, gradient: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """The next shared perturbations and momenta, both (groups,C,H,W)."""
        shared, momenta = self.state[SHARED], self.state[MOMENTA]
        tiny = torch.finfo(gradient.dtype).tiny
        unit = gradient / gradient.abs().sum().clamp(min=tiny)
        numbers = torch.arange(len(shared), device=shared.device)
        members = (numbers[:, None] == group).to(unit.dtype)  # (groups,B)
        sizes = members.sum(1)[:, None]
        # A product of matrices, since an addition by index has no fixed order on a GPU.
        mean = members @ unit.flatten(1) / sizes.clamp(min=1)
        seen = (sizes > 0)[:, :, None, None]
        momenta = torch.where(seen, mean.view_as(momenta) + self.momentum_decay * momenta, momenta)
        scale = self.universal_scale
        later = (shared + scale * momenta.sign()).clamp(-scale, scale)
        return torch.where(seen, later, shared), momenta


class FGSMCUAP(FGSMUAP):
    """FGSM-UAP with u and m for each class, of the images of the class in the batch; those of a
    class without any stay."""

    hard_labels_only: ClassVar[str] = "its starts are those of one class"

    def requires(self) -> frozenset[str]:
        return super().requires() | {"class_logits"}

    def groups(self) -> int:
        return self.setup.num_classes

    def assigned(self, batch: Batch, context: Context) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        return batch.y, batch.x, ()
