"""Cross entropy on x_adv: plain adversarial training (Madry et al., 2018)."""

from dataclasses import dataclass

from torch import Tensor

from fastadv.contract import Fit, Objective, Outputs


@dataclass(eq=False)
class CrossEntropy(Objective):
    """fit(f(x'), y)."""

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        return fit(outputs.adversarial, y, outputs.facts)
