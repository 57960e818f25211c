"""The regularizer: what is added to the mean of the objective."""

from __future__ import annotations

from torch import Tensor

from fastadv.algorithms.contract.tensors import Adversarial, Batch, Outputs
from fastadv.algorithms.contract.weighted import Weighted


class Regularizer(Weighted):
    """A term that is added to the mean of the objective, times ``weight()``."""

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        """The term (0-dim), differentiable in the weights. ``x_adv`` is the input of the outer
        pass, after weakening; ``attacked`` is what the adversary made."""
        raise NotImplementedError
