"""FGSM-PGI: each attack begins where earlier ones ended (Jia et al., ECCV 2022; code
jiaxiaojunQAQ/FGSM-PGI, FGSM_MEP.py).

    fastadv train --plugin examples/plugins/fgsm_pgi.py --method fgsm-mep

This is FGSM-MEP, the published code's variant. Its stored perturbations follow crops and flips, as
those of ATTA; the published ones do not.
"""

from collections import Counter
from typing import ClassVar

import torch
from torch import Tensor

from fastadv import (
    Adversarial,
    Ascent,
    Batch,
    Capabilities,
    Context,
    Outcome,
    Outputs,
    Pass,
    Recipe,
    Regularizer,
    SampleStore,
    Setup,
    StoredPerturbations,
    Threat,
    UserError,
    noise_stream,
    option,
    register,
    register_recipe,
)
from fastadv.algorithms.contract import TRAINING
from fastadv.declared import CountOrZero, NonNegative

INITIAL = noise_stream("fgsm-mep.initial")


@register("fgsm-mep")
class FGSMMEP(StoredPerturbations, Ascent):
    """x' = box(ball(x + w_i + alpha sign g)), g the gradient at x + w_i, alpha = eps.

    w_i is box(ball(x + w_i + alpha sign m_i)) - x of the last epoch, m_i <- g/|g|_1 +
    ``momentum_decay`` m_i; the norm is over the whole batch. Before every ``reset_every``-th epoch,
    counted from 0, w is +-eps with random signs and m is 0.
    """

    takes_start: ClassVar[bool] = False

    reset_every: CountOrZero = option(40, "epochs after which the stored perturbations start anew")
    momentum_decay: NonNegative = option(0.3, "factor of the stored momentum in each epoch")

    def refuses_accumulation(self) -> str:
        return "its gradients are normalised over all images of a call"

    def check_threat(self, threat: Threat) -> None:
        super().check_threat(threat)
        if threat.norm != "linf":
            raise UserError("FGSM-MEP begins in the corners of a Linf ball: take norm='linf'.")

    def sample_state(self) -> tuple[str, ...]:
        return ("perturbations", "momenta")

    def prepare(self, setup: Setup) -> None:
        self.momenta = SampleStore.for_run(setup, self.pad)
        super().prepare(setup)
        self.state["momenta"] = self.momenta.values

    def draw_in(self, epoch: int) -> int:
        return epoch // self.reset_every if self.reset_every else 0

    def renew(self, draw: int, ok: Tensor | None = None) -> None:
        eps, seed = self.setup.threat.nominal, self.setup.seed
        self.store.fill_signs(eps, seed, draw, INITIAL, ok)
        self.momenta.fill_normal(0.0, seed, draw, INITIAL, ok)

    def own_start(self, batch: Batch, restart: int) -> Tensor:
        return batch.x + self.stored(batch)

    def make(self, batch: Batch, context: Context) -> Adversarial:
        start = self.begin(batch)
        momenta = self.momenta.gather(batch.index, batch.view, batch.x)
        x_adv, later, momenta = self.net.run(self.two_steps, start, momenta, batch, context)
        own = context._replace(own=(later - batch.x, momenta))
        return Adversarial(x_adv, batch.x, own, start)

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
        batch, (perturbations, momenta) = outcome.batch, outcome.attacked.context.own
        self.store.write(batch.index, batch.view, perturbations, ok)
        self.momenta.write(batch.index, batch.view, momenta, ok)


@register("start-and-end")
class StartAndEnd(Regularizer):
    """mean (f(x') - f(x0))^2 over batch and classes, x0 the start of the attack.

    Both predictions are differentiated. The published code keeps the graph of the attack's pass at
    x0; here x0 is forwarded once more, which moves BatchNorm's statistics once more.
    """

    reg_weight: NonNegative = option(10.0, "weight of the regularizer in the loss")

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        return Counter({Pass(TRAINING, "train"): 1})

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        if attacked.start is None:
            raise UserError("start-and-end needs an attack with a start, such as 'fgsm-mep'.")
        return (outputs.adversarial - self.net.logits(attacked.start)).square().mean()


register_recipe(
    "fgsm-mep",
    Recipe(
        "FGSM from where the earlier epochs ended",
        "Jia et al. 2022; jiaxiaojunQAQ/FGSM-PGI, FGSM_MEP.py",
        adversary="fgsm-mep",
        attack_loss="fit",
        target="label-smoothing",
        regularizer="start-and-end",
        options={"smoothing": 0.4},
        training={"epochs": 110, "schedule": "multistep", "drops": (100 / 110, 105 / 110)}
        | {"model": "resnet18"},
    ),
)
