"""FGSM-MEP and FGSM-EP: one step from where the earlier epochs ended (Jia et al., 2022)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastadv.algorithms.adversaries.ascent import Ascent
from fastadv.algorithms.contract import Adversarial, Batch, Context, Outcome, Setup
from fastadv.algorithms.sample_state import SampleStore
from fastadv.algorithms.start_points import require_cube
from fastadv.algorithms.stored_perturbations import StoredCorners
from fastadv.declared import CountOrZero, NonNegative, option
from fastadv.engine.noise import Stream, noise_stream
from fastadv.threat import Threat

INITIAL = noise_stream("fgsm-mep.initial")


class FGSMMEP(StoredCorners, Ascent):
    """x' = box(ball(x + w_i + alpha sign g)), g the gradient at x + w_i, alpha = eps.

    w_i is box(ball(x + w_i + alpha sign m_i)) - x of the last epoch, m_i <- g/|g|_1 +
    ``momentum_decay`` m_i; the norm is over the whole batch (jiaxiaojunQAQ/FGSM-PGI, FGSM_MEP.py).
    Before every ``reset_every``-th epoch, counted from 0, w is +-eps with random signs and m is 0.
    With ``momentum_decay`` 0 this is the paper's FGSM-EP: w_i is the last epoch's perturbation.

    The published code adds w_i to any crop and flip of its image, at the same places. With
    ``follow_crops`` it moves with the image, as that of ATTA. With ``clip_start`` g is the
    gradient at box(x + w_i), where a regularizer also finds the start; the step still leaves from
    x + w_i (fzjcdt/FastAT_Benchmark, fast_at/fgsm_pgi.py).
    """

    takes_start: ClassVar[bool] = False
    initial: ClassVar[Stream] = INITIAL

    reset_every: CountOrZero = option(
        40, "epochs after which the stored perturbations start anew; 0: never"
    )
    momentum_decay: NonNegative = option(0.3, "factor of the stored momentum in each epoch")
    clip_start: bool = option(
        False, "clip the start to the range of images before its gradient is taken"
    )

    def refuses_accumulation(self) -> str:
        return "its gradients are normalised over all images of a call"

    def check_threat(self, threat: Threat) -> None:
        super().check_threat(threat)
        require_cube(threat)

    def sample_state(self) -> tuple[str, ...]:
        return ("perturbations", "momenta") if self.momentum_decay else ("perturbations",)

    def prepare(self, setup: Setup) -> None:
        self.momenta = SampleStore.for_run(setup, self.room()) if self.momentum_decay else None
        super().prepare(setup)
        self._clips = self.clip_start
        if self.momenta is not None:
            self.state["momenta"] = self.momenta.values

    def renew(self, draw: int, ok: Tensor | None = None) -> None:
        super().renew(draw, ok)
        if self.momenta is not None:
            self.momenta.fill_normal(0.0, self.setup.seed, draw, INITIAL, ok)

    def own_start(self, batch: Batch, restart: int) -> Tensor:
        return batch.x + self.stored(batch)

    def make(self, batch: Batch, context: Context) -> Adversarial:
        start = self.begin(batch)
        begun = batch.threat.clip(start) if self.clip_start else start
        if self.momenta is None:
            x_adv = self.net.run(self.ascend, start, batch.x, batch, context)
            return Adversarial(x_adv, batch.x, context._replace(own=(x_adv - batch.x,)), begun)
        momenta = self.momenta.gather(batch.index, self.window(batch), batch.x)
        x_adv, later, momenta = self.net.run(self.two_steps, start, momenta, batch, context)
        own = context._replace(own=(later - batch.x, momenta))
        return Adversarial(x_adv, batch.x, own, begun)

    def two_steps(
        self, start: Tensor, momenta: Tensor, batch: Batch, context: Context
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The step along the gradient, that along the momentum, and the momentum; a region."""
        gradient, _ = self.gradient_at(start, batch, context)
        length = gradient.abs().sum().clamp(min=torch.finfo(gradient.dtype).tiny)
        momenta = gradient / length + self.momentum_decay * momenta
        alpha = self.step_size(batch)
        x_adv = batch.threat.step(start, gradient, batch.x, alpha)
        return x_adv, batch.threat.step(start, momenta, batch.x, alpha), momenta

    def after(self, outcome: Outcome, ok: Tensor) -> None:
        batch, own = outcome.batch, outcome.attacked.context.own
        stores = [self.store] if self.momenta is None else [self.store, self.momenta]
        for store, values in zip(stores, own, strict=True):
            store.write(batch.index, self.window(batch), values, ok)
