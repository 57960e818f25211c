"""Clean and adversarial cross entropy mixed (memorization paper, Eq. 6)."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from fastadv.algorithms.contract import (
    Capabilities,
    Conflict,
    Fit,
    Objective,
    Outputs,
    Setup,
    required,
)
from fastadv.algorithms.phases import epoch_of
from fastadv.declared import NonNegative, Share, option
from fastadv.errors import UserError


class CleanMixed(Objective):
    """(1 - g) fit(f(x), y) + g fit(f(x'), y), g rising from ``mix_start`` to ``mix_end``.

    The paper says only "gradually increased from 0 to 1", and no code is published. Here g is
    linear in time over the first ``mix_epochs`` epochs (None: the whole run; below 1: a fraction of
    it) and then stays at ``mix_end``.
    """

    fits: ClassVar[tuple[str, ...]] = ("adversarial", "natural")

    mix_start: Share = option(0.0, "initial share of the adversarial loss")
    mix_end: Share = option(1.0, "final share of the adversarial loss")
    mix_epochs: NonNegative | None = option(
        None, "epochs over which the share rises; below 1: share of the run; none: the whole run"
    )

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_train"})

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if not method.attacks:
            yield Conflict(
                "adversary",
                "it weighs the loss at x' against the loss at x; without an attack they are equal.",
            )

    def follows_epochs(self) -> bool:
        return self.mix_start != self.mix_end

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self._share = torch.full((), self.mix_start, device=setup.device, dtype=setup.dtype)
        if self.mix_epochs is not None:
            self._length = epoch_of(self.mix_epochs, setup, "mix_epochs")
        elif setup.total_epochs is not None or self.mix_start == self.mix_end:
            self._length = setup.total_epochs or 0.0
        else:
            raise UserError(
                "The mixture changes over the run: pass total_steps= and steps_per_epoch=, or "
                "mix_epochs= as a number of epochs."
            )

    def schedule(self, update: int, epoch: float) -> None:
        done = min(epoch / self._length, 1.0) if self._length > 0 else 1.0
        self._share.fill_(self.mix_start + (self.mix_end - self.mix_start) * done)

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        natural = fit(required(outputs.natural), y, outputs.natural_context)
        adversarial = fit(outputs.adversarial, y, outputs.context)
        return (1 - self._share) * natural + self._share * adversarial
