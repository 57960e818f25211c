"""The end of the attack on the same sample in the previous epoch (ATTA: Zheng et al., 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.algorithms.contract import Batch, Outcome
from fastadv.algorithms.start_points import in_ball
from fastadv.algorithms.starts.begun import Begun
from fastadv.algorithms.stored_perturbations import StoredPerturbations
from fastadv.engine import noise

INITIAL_STD = 0.001  # the published store begins at x + 0.001 N(0, I), not clipped to the box


class Stored(StoredPerturbations, Begun):
    """x0 = x + w_i, x the centre of the ball, w_i the perturbation at which the last attack on
    sample i ended.

    Before every ``reset_every``-th epoch, counted from 1 as in the released code, the perturbations
    are drawn anew. A start that the caller gives replaces the stored perturbation. A further
    restart begins at a random point of the ball.
    """

    def renew(self, draw: int, ok: Tensor | None = None) -> None:
        self.store.fill_normal(INITIAL_STD, self.setup.seed, draw, noise.STORE, ok)

    def point(self, batch: Batch, restart: int = 0) -> Tensor:
        return in_ball(batch, self.setup, restart) if restart else batch.x + self.stored(batch)

    @torch.no_grad()
    def after(self, outcome: Outcome, ok: Tensor) -> None:
        batch, attacked = outcome.batch, outcome.attacked
        self.store.write(batch.index, batch.view, attacked.x_adv - attacked.center, ok)
