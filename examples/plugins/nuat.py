"""NuAT: the nuclear norm of the change of the logits (Sriramanan et al., NeurIPS 2021; code
val-iisc/NuAT).

    fastadv train --plugin examples/plugins/nuat.py --method nuat

Two parts hold the norm, the regularizer and the attack's loss; both are ``Weighted``, so that they
have one weight. The batch size divides the norm, also in a shorter last batch. The published code
computes f(x) for the attack in BatchNorm's training mode; here it has the attack's mode. On a GPU
singular values wait for the device: such a step is not captured.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from fastadv import (
    Adversarial,
    AttackLoss,
    Batch,
    Capabilities,
    Conflict,
    Context,
    Fit,
    Objective,
    Outputs,
    Recipe,
    Regularizer,
    Setup,
    Weighted,
    option,
    register,
    register_recipe,
    required,
)
from fastadv.declared import NonNegative


def nuclear(change: Tensor) -> Tensor:
    """The sum of the singular values of ``change`` (B,classes), divided by B; NaN, and no error of
    the decomposition, for values that are not finite."""
    finite = change.isfinite()
    told = torch.where(finite.all(), 0.0, torch.nan).to(change.dtype)
    return torch.linalg.svdvals(torch.where(finite, change, 0.0)).sum() / len(change) + told


class Ramped(Weighted):
    """What both parts with the norm share. Its weight rises by equal amounts after each epoch, from
    0 to ``reg_weight`` at 9/10 of the run."""

    reg_weight: NonNegative = option(4.5, "weight of the nuclear norm at the end of its rise")
    reg_ramp: bool = option(True, "let the weight of the nuclear norm rise over the run")

    def refuses_accumulation(self) -> str:
        return "the nuclear norm is that of all images of a call together"

    def ramp(self, epoch: int, epochs: float) -> float:
        return min(epoch / (0.9 * epochs), 1.0)


@register("nuclear")
class NuclearNorm(Ramped, Regularizer):
    """|f(x') - f(x)|_* / B."""

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_train"})

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if not method.attacks:
            yield Conflict("adversary", "without an attack x' = x and the norm is identically 0.")

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        return nuclear(outputs.adversarial - required(outputs.natural))


@register("nuclear")
class NuclearAttack(Ramped, AttackLoss):
    """CE(f(x'), y) + weight |f(x') - f(x)|_* / B; the norm only in every second update."""

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_attack"})

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if method.labels != "classes":
            yield Conflict("target", "its cross entropy needs classes.")

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self.odd = torch.zeros((), device=setup.device, dtype=setup.dtype)

    def schedule(self, update: int, epoch: float) -> None:
        super().schedule(update, epoch)
        self.odd.fill_(update % 2)

    def mean(self, logits: Tensor, y: Tensor, context: Context, fit: Fit) -> Tensor:
        norm = nuclear(logits - required(context.natural_logits_attack))
        return functional.cross_entropy(logits, y) + self.odd * self.weight() * norm


@register("natural")
class Natural(Objective):
    """fit(f(x), y). The published code forwards x before the attack, then x', then x."""

    fits = ("natural",)

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_train"})

    def bn_updates(self) -> tuple[str, ...]:
        return ("natural", "adversarial", "natural")

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        return fit(required(outputs.natural), y, outputs.context)


register_recipe(
    "nuat",
    Recipe(
        "natural CE, nuclear norm of the logits' change",
        "Sriramanan et al. 2021; val-iisc/NuAT, NuAT_cifar10.py",
        note="the published learning rate is a cycle of its own",
        adversary="fgsm-r",
        attack_loss="nuclear",
        start="bernoulli",
        objective="natural",
        regularizer="nuclear",
        options={"attack_bn": "eval"},
        training={"epochs": 100, "batch_size": 64, "schedule": "triangular", "model": "resnet18"}
        | {"normalize": False},
    ),
)
