"""AdvLC: the largest changes of the logits are penalised (AdvLC paper, Sec. 5 and Alg. 1)."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.contract import (
    Adversarial,
    Batch,
    Capabilities,
    Conflict,
    Outputs,
    Regularizer,
    required,
)
from fastadv.algorithms.regularizers.divergence import jensen_shannon, kl
from fastadv.declared import ShareAboveZero, option


class AdvLC(Regularizer):
    """(1/B) * the sum of the k largest |f(x~) - f(x')| of the whole (B,classes) batch.

    k = int(top_fraction * B * classes), at least 1; x~ is the centre of the ball (for FGSM-N the
    noisy image). Both logits are differentiated. An attack of one step from x~ shares its forward
    pass of x~ with the loss, as Alg. 1 says and its code does not; a longer attack does not keep
    that graph, and x~ is forwarded again.

    ``kind`` chooses another distance (Table 3), divided by B also; with D = f(x~) - f(x'): "l1" is
    the sum of |D|, "squared-l2" the sum of D^2, "kl" KL(p(x~) || p(x')), "js" Jensen-Shannon,
    "nuclear" the sum of the singular values of the matrix D. The paper gives no code, direction or
    weight for them. Beside a loss of the user's own all but "kl" and "js" take outputs of any form.
    """

    kind: Literal["top-n", "l1", "squared-l2", "kl", "js", "nuclear"] = option(
        "top-n", "distance between the logits of clean and adversarial images"
    )
    top_fraction: ShareAboveZero = option(
        0.1, "share of the logit changes, the largest ones, that is penalised"
    )

    def requires(self) -> frozenset[str]:
        of_classes = {"class_logits"} if self.kind in ("kl", "js") else set()
        return frozenset({"natural_logits_train"}) | of_classes

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if not method.attacks:
            yield Conflict(
                "adversary",
                "AdvLC penalises f(x') - f(x); without an attack x' = x and the penalty is "
                "identically 0.",
            )

    def refuses_accumulation(self) -> str | None:
        if self.kind == "top-n":
            return "it penalises the largest changes of the logits among all images of a call"
        if self.kind == "nuclear":
            return "the nuclear norm is that of the logits of all images of a call together"
        return None

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        natural, adversarial = required(outputs.natural), outputs.adversarial
        if adversarial.ndim != 2:  # outputs of another form: all of an image in one row
            natural, adversarial = (z.reshape(len(z), -1) for z in (natural, adversarial))
        return self._distance(natural, adversarial) / len(adversarial)

    def _distance(self, natural: Tensor, adversarial: Tensor) -> Tensor:
        if self.kind == "top-n":
            count = max(1, int(self.top_fraction * natural.numel()))
            return kernels.top_n_sum(natural, adversarial, count)
        if self.kind == "kl":
            return kl(natural, adversarial).sum()
        if self.kind == "js":
            return jensen_shannon(natural, adversarial).sum()
        change = natural - adversarial
        if self.kind == "l1":
            return change.abs().sum()
        if self.kind == "squared-l2":
            return change.pow(2).sum()
        # svdvals raises for values that are not finite; the loss becomes NaN instead, as for the
        # other kinds.
        finite = change.isfinite()
        told = torch.where(finite.all(), 0.0, torch.nan).to(change.dtype)
        return torch.linalg.svdvals(torch.where(finite, change, 0.0)).sum() + told
