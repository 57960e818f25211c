"""Cross entropy on x_adv: plain adversarial training (Madry et al., 2018)."""

from torch import Tensor

from fastadv.algorithms.contract import Fit, Objective, Outputs
from fastadv.declared import NonNegative, option


class CrossEntropy(Objective):
    """fit(f(x'), y).

    ``leave_out_below`` leaves out the samples whose loss is below it (RWP paper, Fig. 4; no code
    was published): the outer loss is the mean over the other samples.
    """

    leave_out_below: NonNegative | None = option(
        None, "leave out samples whose loss is below this; none: leave out none"
    )

    def refuses_accumulation(self) -> str | None:
        if self.leave_out_below is None:
            return None
        return "its mean is over those images of a call that leave_out_below keeps"

    def is_plain(self) -> bool:
        # Another class may compute something else.
        return type(self) is CrossEntropy and self.leave_out_below is None

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        losses = fit(outputs.adversarial, y, outputs.context)
        if self.leave_out_below is None:
            return losses
        stay = (losses.detach() >= self.leave_out_below).to(losses.dtype)
        return stay * losses * (len(losses) / stay.sum().clamp(min=1))
