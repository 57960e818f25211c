"""Cross entropy on x_adv: plain adversarial training (Madry et al., 2018)."""

from torch import Tensor

from fastadv.algorithms.contract import Fit, Objective, Outputs
from fastadv.declared import NonNegative, option
from fastadv.engine.model.bn_momentum import ADVERSARIAL, NATURAL, Pass
from fastadv.engine.process import distributed
from fastadv.errors import UserError

ONCE = (ADVERSARIAL,)
TWICE = (ADVERSARIAL, ADVERSARIAL)
LOGGED = (ONCE, TWICE, (*ONCE, NATURAL), (*TWICE, NATURAL))


class CrossEntropy(Objective):
    """fit(f(x'), y).

    ``bn_passes`` are the passes from the end of the attack on that move BatchNorm's running
    statistics. "adversarial" is the outer pass. locuslab/robust_overfitting and the codes made
    from it forward x' once more when the attack ends, if the attack is in training mode
    ("adversarial,adversarial"), and x after the update, at the new weights
    ("adversarial,adversarial,natural"). Both are for their log: no gradient and no weight depends
    on them, so by default they are not made. They change the statistics with which the model is
    evaluated (measured: by 3 to 11 % on a small network; PGD-20 accuracy by 1 or 2 of 360 images).
    Weights stay the same if the attack is in training mode. Where an update has several calls, the
    last pass is of the images of the last call.

    ``over_batch`` divides the mean loss by the number of images of the update once more, those of
    all processes (hzzheng93/ATTA, train_atta_cifar.py): with 64 images the gradient is 64 times
    smaller beside the same weight decay.

    ``leave_out_below`` leaves out the samples whose loss is below it (RWP paper, Fig. 4; no code
    was published): the outer loss is the mean over the other samples.
    """

    bn_passes: tuple[Pass, ...] = option(
        ONCE, "forward passes that move BatchNorm's running statistics"
    )
    over_batch: bool = option(False, "divide the mean loss by the number of images once more")
    leave_out_below: NonNegative | None = option(
        None, "leave out samples whose loss is below this; none: leave out none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bn_passes not in LOGGED:
            raise UserError(
                "bn_passes of the cross entropy are adversarial, once or twice, and then natural "
                f"or nothing, such as adversarial,natural, not {','.join(self.bn_passes)!r}."
            )

    @property
    def logs_attacked(self) -> bool:
        """See ``LogsPasses``."""
        return self.bn_passes.count(ADVERSARIAL) > 1

    @property
    def logs_clean(self) -> bool:
        """See ``LogsPasses``."""
        return NATURAL in self.bn_passes

    def refuses_accumulation(self) -> str | None:
        if self.over_batch:
            return "its mean is divided by the number of images of a call (over_batch)"
        if self.leave_out_below is None:
            return None
        return "its mean is over those images of a call that leave_out_below keeps"

    def is_plain(self) -> bool:
        # Another class may compute something else.
        own = type(self) is CrossEntropy
        return own and self.leave_out_below is None and not self.over_batch

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        losses = fit(outputs.adversarial, y, outputs.context)
        if self.over_batch:
            losses = losses / (len(losses) * distributed.sharing())  # each has as many images
        if self.leave_out_below is None:
            return losses
        stay = (losses.detach() >= self.leave_out_below).to(losses.dtype)
        return stay * losses * (len(losses) / stay.sum().clamp(min=1))
