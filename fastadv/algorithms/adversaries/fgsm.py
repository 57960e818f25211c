"""FGSM: one step of eps from the image itself (Goodfellow et al., 2015)."""

from dataclasses import dataclass

from torch import Tensor

from fastadv.algorithms.adversaries.ascent import Ascent
from fastadv.algorithms.contract import Adversarial, Batch, Context
from fastadv.errors import UserError


@dataclass(eq=False)
class FGSM(Ascent):
    """x' = box(x + alpha sign grad CE(f(x), y)), alpha = eps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attack_objective == "kl":
            raise UserError(
                "FGSM begins at x' = x, where the KL to f(x) has no gradient: use "
                "attack_objective='ce', or adversary='fast'."
            )

    def make(self, batch: Batch, context: Context) -> Adversarial:
        start = self.given_start(batch, batch.x)
        start = batch.x if start is None else start
        x_adv = self.net.run(self.ascend, start, batch.x, batch.y, context)
        return Adversarial(x_adv, batch.x, context, start)

    def joint_center(self, batch: Batch) -> Tensor | None:
        begins_inside = batch.start is None and self.attack_bn == "train"
        return batch.x if begins_inside else None
