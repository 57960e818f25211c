"""FGSM+: one step of learned size from a learned, per-sample start (APART without its layers)."""

from __future__ import annotations

from collections import Counter
from dataclasses import field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.adversaries.step_sizes import CYCLED, StepSizes, usual_rate
from fastadv.algorithms.contract import (
    INPUT_GRADIENT,
    Adversarial,
    Adversary,
    Batch,
    Capabilities,
    Context,
    Outcome,
    Pass,
    Setup,
    required,
)
from fastadv.algorithms.sample_state import SampleStore
from fastadv.declared import CountOrZero, NonNegative, ShareBelowOne, option
from fastadv.engine import noise
from fastadv.engine.gradient import input_gradient, leaf
from fastadv.errors import UserError
from fastadv.threat import Threat

INPUT, OMEGA = 0, 1  # positions in the tensor of step sizes; the blocks follow
# decay * lr * updates / (1 - momentum) of the paper: 400, 5e-8, 30 epochs of 391 updates, 0.9.
USUAL_DECAY = 2.35


class FGSMPlus(Adversary):
    """One step of alpha_1 from the learned start alpha_omega * omega_i of sample i.

    This is APART (Alg. 1 and Sec. 3.2) without block noise:

    1. x0 = box(x + clamp(alpha_omega omega, +-eps)); s0 = sign of the loss gradient at x0.
    2. x1 = box(x + clamp(delta0 + alpha_1 s0, +-eps)), delta0 = clamp(alpha_omega omega, +-eps);
       one backward pass gives the gradients of the weights, alpha_1, alpha_omega and x1.
    3. omega <- clamp(omega + alpha_1/(alpha_omega + 1e-7) sign(gradient at x1), +-1), written
       back through the crop and flip that made x.
    4. The step sizes alpha_1 and alpha_omega ascend the loss (``StepSizes``).

    ``learned_start=False`` is the ablation without perturbation initialisation (Table 6): there is
    no omega, and the step begins at x.

    ``omega_std`` is the standard deviation of the initial omega. ``step_size_init`` and
    ``omega_rate_init`` are the initial alpha_1 and alpha_omega in pixels. ``pad`` is the largest
    shift of the augmentation in pixels. ``step_size_lr=None`` takes ``usual_rate`` of the first
    call's eps. ``step_size_decay=None`` takes a decay that halves a step size without gradient over
    the whole run of the triangular schedule, as the paper's 400 does at a rate of 5e-8.

    ``hidden_decay``: the released code lists the step sizes in the weights' optimizer also. With
    torch < 2 its weight decay (2e-4) at its learning rate (``hidden_decay_lr``, 0.2 at the peak)
    lowers them further. It is off by default.
    """

    attack_bn: Literal["train", "eval"] = option("train", "mode of BatchNorm during the attack")
    pad: CountOrZero = option(4, "largest shift of the random crops in pixels, as the run's")
    suspects: ClassVar[tuple[str, ...]] = ("step_size_lr",)

    step_size_init: NonNegative = option(
        1e-4, "initial step size of the attack in pixels (alpha_1)"
    )
    omega_rate_init: NonNegative = option(
        1e-4, "initial scale of the learned start in pixels (alpha_omega)"
    )
    omega_std: NonNegative = option(1e-3, "standard deviation of the initial omega")
    step_size_lr: NonNegative | None = option(
        None, "learning rate of the step sizes; none: one that follows from eps"
    )
    step_size_decay: NonNegative | None = option(
        None, "decay of the step sizes; none: the one that halves them over a run without gradients"
    )
    step_size_momentum: ShareBelowOne = option(0.9, "momentum of the step sizes' ascent")
    step_size_schedule: Literal["triangular", "constant"] = option(
        "triangular", "schedule of the step sizes' learning rate"
    )
    hidden_decay: NonNegative = option(
        0.0, "second weight decay of the step sizes, as in the released code; 0: off"
    )
    hidden_decay_lr: NonNegative = option(0.2, "peak learning rate of that second weight decay")
    learned_start: bool = option(
        True, "start from the learned perturbation of each sample; without it, from the image"
    )

    steps: StepSizes = field(init=False, repr=False)
    hidden: StepSizes | None = field(init=False, repr=False, default=None)
    store: SampleStore = field(init=False, repr=False)

    def sample_state(self) -> tuple[str, ...]:
        return ("omega",) if self.learned_start else ()

    def refuses_accumulation(self) -> str | None:
        return "every call moves its step sizes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size_schedule == "triangular" and self.step_size_momentum < CYCLED:
            raise UserError(
                f"step_size_momentum must be at least {CYCLED:g} where the triangular schedule "
                f"lowers it by that much, not {self.step_size_momentum:g}; or take "
                "step_size_schedule='constant'."
            )

    @property
    def begins_at_center(self) -> bool:
        return not self.learned_start

    def requires(self) -> frozenset[str]:
        return frozenset({"input_gradient"})

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        return Counter({Pass(INPUT_GRADIENT, self.attack_bn): 1})

    @property
    def block_count(self) -> int:
        """The number of blocks with their own noise."""
        return 0

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self._prepare_steps(setup)
        self.state = {
            "step_sizes": self.steps.values,
            "step_size_momentum": self.steps.buffer,
        }
        if self.hidden is not None:
            self.state["hidden_decay_momentum"] = self.hidden.buffer
        if self.learned_start:
            self._prepare_store(setup)
            self.state["omega"] = self.store.values

    def check_threat(self, threat: Threat) -> None:
        if threat.targeted:
            raise UserError(
                "FGSM+ and APART learn their start and steps by ascending the loss of the weights, "
                "so they cannot aim at another label."
            )
        if threat.norm != "linf":
            raise UserError(
                "FGSM+ and APART learn the size of sign steps in a Linf ball; use norm='linf'."
            )

    def sized(self) -> bool:
        return self.learned_start

    def check_images(self, batch: Batch) -> None:
        self.store.check_images(batch.x.shape, batch.view)

    def _prepare_steps(self, setup: Setup) -> None:
        if setup.total_steps is None and (
            self.step_size_schedule == "triangular" or self.step_size_lr is None
        ):
            raise UserError(
                "The learned step sizes follow the length of the run: pass total_steps=, or "
                "step_size_lr= together with step_size_schedule='constant'."
            )
        updates = setup.total_steps or 1
        momentum = self.step_size_momentum
        lr = self.step_size_lr
        if lr is None:
            lr = usual_rate(setup.threat.nominal, updates, momentum)
        decay = self.step_size_decay
        if decay is None:
            decay = USUAL_DECAY * (1 - momentum) / (lr * updates) if lr > 0 else 0.0
        dtype = torch.promote_types(setup.dtype, torch.float32)
        values = torch.zeros(2 + self.block_count, device=setup.device, dtype=dtype)
        values[INPUT], values[OMEGA] = self.step_size_init, self.omega_rate_init
        self.steps = StepSizes(values, lr, decay, momentum)
        if self.hidden_decay:
            self.hidden = StepSizes(values, self.hidden_decay_lr, self.hidden_decay, momentum)

    def _prepare_store(self, setup: Setup) -> None:
        self.store = SampleStore.for_run(setup, self.pad)
        self.store.fill_normal(self.omega_std, setup.seed, 0, noise.STORE)

    def schedule(self, update: int, epoch: float) -> None:
        triangular = self.step_size_schedule == "triangular"
        total = self.setup.total_steps if triangular else None
        self.steps.schedule(update, total)
        if self.hidden is not None:
            self.hidden.schedule(update, total)

    def make(self, batch: Batch, context: Context) -> Adversarial:
        x0, omega = self._start(batch)
        signs = self.net.run(self._signs, x0, batch, context)
        found = context._replace(signs=tuple(signs), start=omega)
        # Not through outer_input: the outer pass itself makes the noise inside the blocks.
        return Adversarial(self._moved(batch, self.steps.values, found), batch.x, found)

    def unmoved(self, batch: Batch, attacked: Adversarial) -> Tensor | None:
        return (attacked.context.signs[0] == 0).flatten(1).all(1)

    def _start(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """x0 = box(x + clamp(alpha_omega omega, +-eps)) and omega, both (B,C,H,W)."""
        rate = self.steps.values[OMEGA]
        if batch.start is None and self.learned_start:
            x0, omega = self.store.start_from(batch.index, batch.view, batch.x, rate, batch.threat)
            return batch.threat.masked(x0, batch.x), omega
        if batch.start is None:
            return batch.x, torch.zeros_like(batch.x)
        return batch.threat.project(batch.x + batch.start, batch.x), batch.start / rate

    def _signs(self, x0: Tensor, batch: Batch, context: Context) -> list[Tensor]:
        """The signs of the loss gradient at x0; a region."""
        x0 = leaf(x0)
        loss = self.setup.attack_loss(self.net.logits(x0), batch.attacked_y, context)
        return kernels.block_signs([input_gradient(loss, x0)])

    def leaves(self) -> list[Tensor]:
        return [self.steps.values]

    def outer_input(
        self, batch: Batch, attacked: Adversarial, leaves: list[Tensor]
    ) -> tuple[Tensor, list[Tensor] | None]:
        steps, found = leaves[0], attacked.context
        return self._moved(batch, steps, found), self._block_noise(steps, found)

    def _moved(self, batch: Batch, steps: Tensor, found: Context) -> Tensor:
        """x1 = box(x + clamp(delta0 + alpha_1 s0, +-eps)), differentiable in the step sizes."""
        threat = batch.threat
        eps: Any = threat.radius(batch.x)
        delta = (steps[OMEGA] * required(found.start)).clamp(-eps, eps)
        delta = threat.movable((delta + steps[INPUT] * found.signs[0]).clamp(-eps, eps))
        return threat.clip(batch.x + delta).to(batch.x.dtype)

    def _block_noise(self, steps: Tensor, found: Context) -> list[Tensor] | None:
        return None

    @torch.no_grad()
    def after(self, outcome: Outcome, ok: Tensor) -> None:
        batch = outcome.batch
        if self.learned_start:
            alpha, rate = self.steps.values[INPUT], self.steps.values[OMEGA]
            if batch.start is not None:
                window = required(outcome.attacked.context.start).to(self.store.values.dtype)
                self.store.write(batch.index, batch.view, window, ok)
            ratio = alpha / (rate + 1e-7)
            gradient = required(outcome.input_gradient)
            self.store.ascend(batch.index, batch.view, gradient, ratio, ok)
        self.steps.ascend(outcome.leaf_gradients[0], ok)
        if self.hidden is not None:
            self.hidden.ascend(torch.zeros_like(self.steps.values), ok)

    def report(self) -> dict[str, Tensor]:
        """See ``Reports``: the learned step sizes, in pixels (those of blocks: in the units of what
        enters them)."""
        values = self.steps.values
        found = {"step_size": values[INPUT]}
        if self.learned_start:
            found["omega_rate"] = values[OMEGA]
        blocks = values[2:].unbind()
        return found | {f"step_size_block_{n}": value for n, value in enumerate(blocks, start=1)}

    def advice(self, update: int) -> str | None:
        alpha = abs(float(self.steps.values[INPUT]))
        if alpha >= self.setup.threat.nominal / 10:
            return None
        return (
            f"The learned input step is {alpha:.2g}, below a tenth of eps "
            f"({self.setup.threat.nominal:.3g}), after {update} updates: the attack is too weak to "
            f"train against. Raise step_size_lr (now {self.steps.lr:.2g}) or lower "
            f"step_size_decay (now {self.steps.decay:.2g})."
        )
