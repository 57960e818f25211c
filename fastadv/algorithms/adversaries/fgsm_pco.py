"""FGSM-PCO: between the last epoch's example and this one's, by confidence (Wang et al., 2024)."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

from torch import Tensor

from fastadv.algorithms.adversaries.ascent import Ascent
from fastadv.algorithms.contract import (
    TRAINING,
    Adversarial,
    Batch,
    Capabilities,
    Context,
    Outcome,
    Pass,
)
from fastadv.algorithms.start_points import require_cube
from fastadv.algorithms.stored_perturbations import StoredCorners
from fastadv.declared import CountOrZero, NonNegative, option
from fastadv.engine.noise import Stream, noise_stream
from fastadv.threat import Threat

INITIAL = noise_stream("fgsm-pco.initial")


class FGSMPCO(StoredCorners, Ascent):
    """x' = (1 - p) (x + w_i) + p (x + ``step_scale`` d), p = softmax(f(x + w_i))_y; then w_i <- d.

    d = box(ball(x + w_i + alpha sign g)) - x is the step of FGSM, g the gradient at x + w_i, alpha
    = eps. x' is not clipped, neither to the ball nor to the box. The update differentiates p also,
    as in the authors' code (HandingWangXDGroup/FGSM-PCO, FGSM-PCO.py), which keeps the graph of the
    attack's pass; here x + w_i is forwarded again, without a second move of BatchNorm's statistics.

    w_i is +-eps with random signs at first, and by default never anew. Both the authors and
    FastAT_Benchmark add it to any crop and flip of its image, at the same places.
    """

    takes_start: ClassVar[bool] = False
    initial: ClassVar[Stream] = INITIAL
    hard_labels_only: ClassVar[str] = "it mixes by the probability of one class"

    reset_every: CountOrZero = option(
        0, "epochs after which the stored perturbations start anew; 0: never"
    )
    step_scale: NonNegative = option(1.5, "factor of the step of FGSM that is mixed")

    def requires(self) -> frozenset[str]:
        return super().requires() | {"class_logits"}

    def check_threat(self, threat: Threat) -> None:
        super().check_threat(threat)
        require_cube(threat)

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        return super().extra_passes(method) + Counter({Pass(TRAINING, "train"): 1})

    def own_start(self, batch: Batch, restart: int) -> Tensor:
        return batch.x + self.stored(batch)

    def make(self, batch: Batch, context: Context) -> Adversarial:
        start = self.begin(batch)
        x_adv, stepped = self.net.run(self._mixture, start, batch, context)
        return Adversarial(x_adv, batch.x, context, start, stepped)

    def _mixture(self, start: Tensor, batch: Batch, context: Context) -> tuple[Tensor, Tensor]:
        """x' and x + d, both (B,C,H,W); a region."""
        gradient, logits = self.gradient_at(start, batch, context)
        stepped = self.moved(start.detach(), gradient, batch.x, batch)
        return self._mixed(start.detach(), stepped, logits, batch), stepped

    def _mixed(self, start: Tensor, stepped: Tensor, logits: Tensor, batch: Batch) -> Tensor:
        p = logits.softmax(1).gather(1, batch.y[:, None])[:, :, None, None].to(start.dtype)
        return (1 - p) * start + p * (batch.x + self.step_scale * (stepped - batch.x))

    def leaves(self) -> list[Tensor]:
        """See ``LearnsSteps``: none beside the weights."""
        return []

    def outer_input(
        self, batch: Batch, attacked: Adversarial, leaves: list[Tensor]
    ) -> tuple[Tensor, list[Tensor] | None]:
        """See ``LearnsSteps``: x', differentiable in the weights."""
        start, stepped = attacked.start, attacked.stepped
        if start is None or stepped is None:
            raise RuntimeError("this attack has a start and an end")
        with self.net.bn_momenta.still():
            logits = self.net.logits(start)
        return self._mixed(start, stepped, logits, batch), None

    def after(self, outcome: Outcome, ok: Tensor) -> None:
        batch, attacked = outcome.batch, outcome.attacked
        if attacked.stepped is not None:
            later = attacked.stepped - attacked.center
            self.store.write(batch.index, self.window(batch), later, ok)
