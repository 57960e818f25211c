"""IKL: the KL of TRADES in two parts, with weights of each class (Cui et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fastadv.algorithms.contract import (
    Capabilities,
    Conflict,
    Fit,
    Objective,
    Outcome,
    Outputs,
    Setup,
    required,
)
from fastadv.declared import NonNegative, Positive, option
from fastadv.engine.model.bn_momentum import ADVERSARIAL, NATURAL
from fastadv.engine.process import distributed


class IKL(Objective):
    """fit(f(x), y) + a CE(p(x), f(x')) + b/4 sum_jk s_j s_k (d_j - d_k)^2, d = f(x) - f(x').

    a is ``ce_weight``, b ``mse_weight``. p(x) is held fixed in the cross entropy; the squares are
    differentiated in both logits. With s = p(x), held fixed as f(x) in d, this would have the
    gradient of the KL (DKL). Here s (classes) belongs to the label y: the mean of
    softmax(f(x) / ``class_temperature``) over the images of that class in the epoch before, and
    uniform in the first epoch. A class that an epoch did not show keeps its weights.

    Published in jiequancui/DKL, DKLv1/Adv-training-dkl/train_dkl_cifar10.py, which forwards x'
    first and then x.
    """

    fits: ClassVar[tuple[str, ...]] = ("natural",)
    hard_labels_only: ClassVar[str] = "its weights are those of one right class"

    suspects: ClassVar[tuple[str, ...]] = (
        "ce_weight",
        "mse_weight",
    )

    ce_weight: NonNegative = option(4.0, "weight of the cross entropy between the predictions")
    mse_weight: NonNegative = option(20.0, "weight of the squared changes of the logits")
    class_temperature: Positive = option(
        4.0, "temperature of the predictions whose means weigh the classes"
    )

    weights: Tensor = field(init=False, repr=False)
    sums: Tensor = field(init=False, repr=False)

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_train", "class_logits"})

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if not method.attacks:
            yield Conflict(
                "adversary", "IKL compares f(x') with f(x), which are the same without an attack."
            )

    def bn_updates(self) -> tuple[str, ...]:
        """See ``OrdersBatchNorm``."""
        return (ADVERSARIAL, NATURAL)

    def follows_epochs(self) -> bool:
        return True

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        # On the CPU, where reading it stalls no device.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._make_room()

    def _make_room(self) -> None:
        classes, setup = self.setup.num_classes, self.setup
        dtype = torch.promote_types(setup.dtype, torch.float32)
        self.weights = torch.full((classes, classes), 1 / classes, device=setup.device, dtype=dtype)
        self.sums = torch.zeros_like(self.weights)
        self.state = {
            "class_weights": self.weights,
            "class_sums": self.sums,
            "class_epoch": self._epoch,
        }

    @torch.no_grad()
    def schedule(self, update: int, epoch: float) -> None:
        if len(self.weights) != self.setup.num_classes:
            self._make_room()
        if int(epoch) == int(self._epoch):
            return
        total = self.sums.sum(1, keepdim=True)
        means = torch.where(total > 0, self.sums / total, self.weights)
        sound = self.setup.sound()
        self.weights.copy_(torch.where(sound, means, self.weights))
        self.sums.copy_(torch.where(sound, torch.zeros_like(self.sums), self.sums))
        self._epoch.fill_(int(epoch))

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        natural, adversarial = required(outputs.natural), outputs.adversarial
        taught = natural.detach().softmax(1)
        crossed = -(taught * adversarial.log_softmax(1)).sum(1)
        weights = self.weights.to(natural.dtype)[y]
        change = natural - adversarial
        # sum_jk s_j s_k (d_j - d_k)^2 = 2 sum_j s_j (d_j - m)^2 with m = sum_j s_j d_j, sum s = 1
        mean = (weights * change).sum(1, keepdim=True)
        spread = (weights * (change - mean).square()).sum(1)
        fitted = fit(natural, y, outputs.context)
        return fitted + self.ce_weight * crossed + self.mse_weight / 2 * spread

    @torch.no_grad()
    def after(self, outcome: Outcome, ok: Tensor) -> None:
        logits = required(outcome.outputs.natural).to(self.sums.dtype)
        shares = (logits / self.class_temperature).softmax(1)
        right = functional.one_hot(outcome.batch.y, len(self.sums)).to(shares.dtype)
        seen = right.T @ shares
        distributed.average([seen])
        seen = seen * distributed.sharing()
        self.sums.add_(torch.where(ok, seen, torch.zeros_like(seen)))
