"""MART: misclassified examples weigh more (Wang et al., ICLR 2020; YisenWang/MART).

fastadv train --plugin examples/plugins/mart.py --method mart
"""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fastadv import (
    Capabilities,
    Conflict,
    Fit,
    Objective,
    OnData,
    Outputs,
    Recipe,
    option,
    register,
    register_recipe,
    required,
)
from fastadv.declared import NonNegative


@register("mart")
class Mart(Objective):
    """BCE(p', y) + beta KL(p || p') (1 - p_y), p = softmax f(x), p' = softmax f(x').

    BCE is fit(f(x'), y) - log(1 - max_{k != y} p'_k). The small numbers in the logarithms are those
    of the published code, which differentiates through both predictions.
    """

    hard_labels_only: ClassVar[str] = "its margin is that of one right class"

    beta: NonNegative = option(6.0, "weight of the KL divergence")

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_train"})

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if not method.attacks:
            yield Conflict("adversary", "without an attack x' = x and MART's KL is identically 0.")
        if method.labels != "classes":
            yield Conflict("target", "its KL compares predictions of classes.")

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        p, p_adv = required(outputs.natural).softmax(1), outputs.adversarial.softmax(1)
        first, second = p_adv.topk(2).indices.unbind(1)
        wrong = p_adv.gather(1, torch.where(first == y, second, first)[:, None]).squeeze(1)
        margin = -torch.log(1.0001 - wrong + 1e-12)
        kl = functional.kl_div(torch.log(p_adv + 1e-12), p, reduction="none").sum(1)
        hard = 1.0000001 - p.gather(1, y[:, None]).squeeze(1)
        return fit(outputs.adversarial, y, outputs.context) + margin + self.beta * kl * hard


register_recipe(
    "mart",
    Recipe(
        "misclassified examples weigh more",
        "Wang et al. 2020; YisenWang/MART, train_resnet.py",
        objective="mart",
        start="gaussian",
        options={"beta": 5.0, "attack_bn": "eval"},
        on_data={
            "cifar10": OnData(options={"alpha": 0.007}, where={"norm": "linf", "eps": 8 / 255})
        },
        training={"epochs": 120, "lr": 0.01, "weight_decay": 3.5e-3, "schedule": "multistep"}
        | {"drops": (74 / 120, 89 / 120, 99 / 120), "model": "resnet18", "normalize": False},
    ),
)
