"""MART: misclassified examples weigh more (Wang et al., 2020)."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fastadv.algorithms.contract import Capabilities, Conflict, Fit, Objective, Outputs, required
from fastadv.declared import NonNegative, option


class Mart(Objective):
    """fit(f(x'), y) - log(1 - max_{k != y} p'_k) + beta KL(p || p') (1 - p_y), p = softmax f(x),
    p' = softmax f(x').

    The first two terms are the paper's boosted cross entropy. The published code (YisenWang/MART,
    mart.py) adds small numbers in the logarithms and in 1 - p_y, which are taken over, and
    differentiates through both predictions. It forwards x and x' once each, in this order.
    """

    hard_labels_only: ClassVar[str] = "its margin is that of one right class"

    suspects: ClassVar[tuple[str, ...]] = ("beta",)

    beta: NonNegative = option(5.0, "weight of the KL divergence, times 1 - p_y")

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_train"})

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if not method.attacks:
            yield Conflict("adversary", "without an attack x' = x and MART's KL is identically 0.")
        if method.labels != "classes":
            yield Conflict(
                "target",
                "it fits f(x') by a cross entropy of its own, not by the loss of a target.",
            )

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        p, p_adv = required(outputs.natural).softmax(1), outputs.adversarial.softmax(1)
        first, second = p_adv.topk(2).indices.unbind(1)
        wrong = p_adv.gather(1, torch.where(first == y, second, first)[:, None]).squeeze(1)
        margin = -torch.log(1.0001 - wrong + 1e-12)
        kl = functional.kl_div(torch.log(p_adv + 1e-12), p, reduction="none").sum(1)
        hard = 1.0000001 - p.gather(1, y[:, None]).squeeze(1)
        return fit(outputs.adversarial, y, outputs.context) + margin + self.beta * kl * hard
