"""Free-m: one backward pass for the weights and the perturbation (Shafahi et al., 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastadv.algorithms.contract import (
    Adversarial,
    Adversary,
    Batch,
    Context,
    Outcome,
    Setup,
    required,
)
from fastadv.algorithms.sample_state import require_size
from fastadv.declared import NonNegative, Passes, option
from fastadv.errors import UserError
from fastadv.threat import Threat

DELTA = "delta"


class Free(Adversary):
    """Every batch updates the weights ``replays`` times; delta moves by alpha after each update.

    z = f(x + delta); the one backward pass gives dL/dtheta and dL/ddelta, then
    delta <- project(delta + alpha sign(dL/ddelta)), alpha = eps. delta (B,C,H,W) begins at zero. It
    belongs to a position in the batch, not to a sample, and is kept from batch to batch and from
    epoch to epoch; a short last batch uses its first rows. There is no attack beside the outer
    pass, so delta ascends the whole loss of the recipe. A given ``start`` is delta at the first
    replay.

    ``box`` is where the range of images holds. "image" (mahyarnajibi/FreeAdversarialTraining):
    z = f(box(x + delta)); a clipped element has no gradient and does not move. "delta"
    (locuslab/fast_adversarial, CIFAR10/train_free.py): the image is not clipped, and after each
    update delta is clipped so that x + delta is in the box, x being that batch's; at the next batch
    x + delta may leave it. Without ``keep_delta`` delta begins at zero for every batch
    (fzjcdt/FastAT_Benchmark, fast_at/free_at.py).
    """

    takes_alpha: ClassVar[bool] = True
    rank_local_state: ClassVar[tuple[str, ...]] = (DELTA,)
    places_in_batch: ClassVar[tuple[str, ...]] = (DELTA,)

    attack_bn: Literal["train", "eval"] = field(init=False, repr=False, default="train")
    alpha: NonNegative | None = option(None, "step of the perturbation in pixels; none: eps")
    replays: Passes = option(8, "updates per batch")
    box: Literal["image", "delta"] = option("image", "what is clipped to the range of images")
    keep_delta: bool = option(True, "keep the perturbation from batch to batch")

    _no_gradient: Tensor | None = field(init=False, repr=False, default=None)
    # True once a batch had a radius of its own: what it left may lie outside of the next one's.
    _radii_differ: bool = field(init=False, repr=False, default=False)

    @property
    def updates_per_batch(self) -> int:
        """See ``Replays``."""
        return self.replays

    @property
    def gradient_steps(self) -> int:
        return 0

    def requires(self) -> frozenset[str]:
        return frozenset({"input_gradient"})

    def refuses_accumulation(self) -> str | None:
        return "every call updates the weights"

    def check_threat(self, threat: Threat) -> None:
        if threat.targeted:
            raise UserError(
                "Free's delta ascends the loss of the weights, so it cannot aim at another label."
            )
        threat.require_step(self.alpha)

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self._make_room(setup.batch_size)

    @torch.no_grad()
    def schedule(self, update: int, epoch: float) -> None:
        if not self.keep_delta and update % self.replays == 0:
            self.state[DELTA].masked_fill_(self.setup.sound(), 0.0)

    def _make_room(self, rows: int) -> None:
        """Grow delta to at least ``rows`` rows; existing rows keep their values, new ones are 0."""
        old = self.state.get(DELTA)
        if old is not None and len(old) >= rows:
            return
        shape = (rows, *self.setup.image_shape)
        delta = torch.zeros(shape, device=self.setup.device, dtype=self.setup.dtype)
        if old is not None:
            delta[: len(old)] = old
        self.state[DELTA] = delta

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        # The saved delta may have fewer or more rows: a run may begin with a short batch.
        found = saved[DELTA]
        if found.shape[1:] != self.state[DELTA].shape[1:]:
            super().load_state(saved)
        self._make_room(len(found))
        self.state[DELTA].zero_()[: len(found)] = found
        inside = self._projected(found, self.setup.threat)
        # Rounding aside: a projection of what lies inside would change its last digit in L2.
        if not torch.allclose(found, inside, rtol=1e-5, atol=0):
            self._radii_differ = True

    def check_images(self, batch: Batch) -> None:
        require_size(batch.x, self.setup, "Free keeps perturbations")

    @torch.no_grad()
    def follow_threat(self, threat: Threat) -> None:
        """Project delta to the new ball."""
        delta = self.state[DELTA]
        delta.copy_(self._projected(delta, threat))

    def _projected(self, delta: Tensor, threat: Threat) -> Tensor:
        """``delta`` (B,C,H,W) in the ball of ``threat`` around 0."""
        return threat.unboxed().project(delta, torch.zeros_like(delta))

    def make(self, batch: Batch, context: Context) -> Adversarial:
        self._make_room(len(batch.x))
        delta = self.state[DELTA][: len(batch.x)] if batch.start is None else batch.start
        if isinstance(batch.threat.eps, Tensor):
            self._radii_differ = True
        if self._radii_differ:
            delta = self._projected(delta, batch.threat)
        delta = batch.threat.movable(delta)
        x_adv = batch.x + delta
        x_adv = batch.threat.clip(x_adv) if self.box == "image" else x_adv
        return Adversarial(x_adv, batch.x, context._replace(start=delta.clone()))

    @property
    def chosen_step(self) -> float | None:
        return self.alpha

    def _step_size(self, batch: Batch) -> float | Tensor:
        if batch.alpha is not None:
            return batch.alpha
        return self.usual_step(batch.threat) if self.alpha is None else self.alpha

    @torch.no_grad()
    def after(self, outcome: Outcome, ok: Tensor) -> None:
        batch, threat = outcome.batch, outcome.batch.threat
        delta = required(outcome.attacked.context.start)
        gradient = required(outcome.input_gradient)
        if self.box == "image":
            reached = batch.x + delta
            inside = threat.clip(reached) == reached
            gradient = torch.where(inside, gradient, 0.0)
        self._no_gradient = (gradient == 0).flatten(1).all(1)
        center = torch.zeros_like(delta)
        moved = threat.unboxed().step(delta, gradient, center, self._step_size(batch))
        if self.box == "delta":
            low, high = threat.ends(batch.x)
            moved = moved.clamp(low - batch.x, high - batch.x)
        rows = self.state[DELTA][: len(delta)]
        rows.copy_(torch.where(ok, moved, rows))

    def unmoved(self, batch: Batch, attacked: Adversarial) -> Tensor | None:
        found, self._no_gradient = self._no_gradient, None
        return found if self.alpha != 0 and batch.threat.nominal else None
