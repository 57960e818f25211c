"""FGSM-BP: one step from where the attack on the batch before ended (Jia et al., 2022)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fastadv.algorithms.adversaries.ascent import Ascent
from fastadv.algorithms.contract import Adversarial, Batch, Context, Outcome, Setup
from fastadv.algorithms.sample_state import require_size
from fastadv.algorithms.start_points import random_signs, require_cube
from fastadv.engine.noise import noise_stream
from fastadv.threat import Threat

INITIAL = noise_stream("fgsm-bp.initial")
BUFFER = "buffer"


class FGSMBP(Ascent):
    """x' = box(ball(x + w_b + alpha sign g)), g the gradient at x + w_b, alpha = eps; then
    w_b <- x' - x.

    w_b belongs to place b in the batch, not to a sample, and is kept from batch to batch; a short
    last batch uses the first places. It begins as +-eps with random signs. The paper gives the
    formula (its Sec. 3) and no code; it begins there as the published FGSM-MEP does.
    """

    takes_start: ClassVar[bool] = False
    rank_local_state: ClassVar[tuple[str, ...]] = (BUFFER,)
    places_in_batch: ClassVar[tuple[str, ...]] = (BUFFER,)

    def refuses_accumulation(self) -> str:
        return "every call continues from the perturbations of the call before"

    def check_threat(self, threat: Threat) -> None:
        super().check_threat(threat)
        require_cube(threat)

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self._make_room(setup.batch_size)

    def _make_room(self, places: int) -> None:
        """Grow the buffer to at least ``places`` places, of which the old ones stay."""
        old = self.state.get(BUFFER)
        if old is not None and len(old) >= places:
            return
        buffer = random_signs(places, self.setup, INITIAL) * self.setup.threat.nominal
        if old is not None:
            buffer[: len(old)] = old
        self.state[BUFFER] = buffer

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        # A run may have begun with a batch of another size.
        found = saved[BUFFER]
        if found.shape[1:] != self.state[BUFFER].shape[1:]:
            super().load_state(saved)
        self._make_room(len(found))
        self.state[BUFFER][: len(found)] = found

    def check_images(self, batch: Batch) -> None:
        require_size(batch.x, self.setup, "FGSM-BP keeps perturbations")
        self._make_room(len(batch.x))

    def own_start(self, batch: Batch, restart: int) -> Tensor:
        return batch.x + batch.threat.movable(self.state[BUFFER][: len(batch.x)])

    def make(self, batch: Batch, context: Context) -> Adversarial:
        start = self.begin(batch)
        x_adv = self.net.run(self.ascend, start, batch.x, batch, context)
        return Adversarial(x_adv, batch.x, context, start)

    def after(self, outcome: Outcome, ok: Tensor) -> None:
        attacked = outcome.attacked
        places = self.state[BUFFER][: len(attacked.x_adv)]
        places.copy_(torch.where(ok, attacked.x_adv - attacked.center, places))
