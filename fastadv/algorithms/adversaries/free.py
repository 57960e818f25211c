"""Free-m: one backward pass for the weights and the perturbation (Shafahi et al., 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastadv.algorithms.contract import (
    Adversarial,
    Adversary,
    Batch,
    Context,
    Setup,
    required,
)
from fastadv.algorithms.sample_state import by
from fastadv.declared import NonNegative, Passes, option
from fastadv.errors import UserError
from fastadv.threat import Threat

DELTA = "delta"


@dataclass(eq=False)
class Free(Adversary):
    """Every batch updates the weights ``replays`` times; delta moves by alpha after each update.

    z = f(box(x + delta)); the one backward pass gives dL/dtheta and dL/ddelta, then
    delta <- project(delta + alpha sign(dL/ddelta)), alpha = eps. delta (B,C,H,W) begins at zero. It
    belongs to a position in the batch, not to a sample, and is kept from batch to batch and from
    epoch to epoch; a short last batch uses its first rows. The box clips the image: a clipped
    element has no gradient and does not move. There is no attack beside the outer pass, so delta
    ascends the whole loss of the recipe. A given ``start`` is delta at the first replay.
    """

    wants_input_gradient: ClassVar[bool] = True
    rank_local_state: ClassVar[tuple[str, ...]] = (DELTA,)

    attack_objective: Literal["ce", "kl"] = field(init=False, repr=False, default="ce")
    attack_bn: Literal["train", "eval"] = field(init=False, repr=False, default="train")
    alpha: NonNegative | None = option(None, "step of the perturbation in pixels; none: eps")
    replays: Passes = option(8, "updates per batch")

    @property
    def updates_per_batch(self) -> int:
        return self.replays

    _no_gradient: Tensor | None = field(init=False, repr=False, default=None)

    def refuses_accumulation(self) -> str | None:
        return "every call updates the weights"

    def check_threat(self, threat: Threat) -> None:
        threat.require_step(self.alpha)

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self._make_room(setup.batch_size)

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

    def check_images(self, batch: Batch) -> None:
        kept = self.setup.image_shape
        if batch.x.shape[1:] != kept:
            raise UserError(
                f"Free stores perturbations of size {by(kept)}, but these images have size "
                f"{by(batch.x.shape[1:])}: use one size, or build one step per size."
            )

    @torch.no_grad()
    def follow_threat(self, threat: Threat) -> None:
        super().follow_threat(threat)
        delta = self.state[DELTA]
        delta.copy_(replace(threat, low=-inf, high=inf).project(delta, torch.zeros_like(delta)))

    def make(self, batch: Batch, context: Context) -> Adversarial:
        self._make_room(len(batch.x))
        threat = self.setup.threat
        delta = self.state[DELTA][: len(batch.x)] if batch.start is None else batch.start
        x_adv = (batch.x + delta).clamp(threat.low, threat.high)
        return Adversarial(x_adv, batch.x, context._replace(start=delta.clone()))

    @torch.no_grad()
    def after(
        self,
        batch: Batch,
        attacked: Adversarial,
        leaf_gradients: list[Tensor],
        input_gradient: Tensor | None,
        ok: Tensor,
    ) -> None:
        if input_gradient is None:
            raise RuntimeError("the outer pass gave no input gradient")
        threat, delta = self.setup.threat, required(attacked.context.start)
        unbounded = Threat(threat.norm, threat.eps, -inf, inf)
        reached = batch.x + delta
        inside = (reached >= threat.low) & (reached <= threat.high)
        gradient = torch.where(inside, input_gradient, 0.0)
        self._no_gradient = (gradient == 0).flatten(1).all(1)
        alpha = threat.eps if self.alpha is None else self.alpha
        moved = unbounded.step(delta, gradient, torch.zeros_like(delta), alpha)
        rows = self.state[DELTA][: len(delta)]
        rows.copy_(torch.where(ok, moved, rows))

    def unmoved(self, attacked: Adversarial) -> Tensor | None:
        found, self._no_gradient = self._no_gradient, None
        alpha = self.setup.threat.eps if self.alpha is None else self.alpha
        return found if alpha and self.setup.threat.eps else None
