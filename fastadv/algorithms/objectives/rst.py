"""RST: TRADES on labelled and pseudo-labelled images together (Carmon et al., 2019)."""

from fastadv.algorithms.objectives.trades import Trades
from fastadv.declared import option
from fastadv.engine.model.bn_momentum import ADVERSARIAL, NATURAL, Pass


class RST(Trades):
    """The loss of TRADES on batches of which one half has pseudo-labels.

    The RWP paper has a weight of the unlabelled half (Sec. 2); in the released code it is the 1:1
    mixture of the batch. Pseudo-labels come from ``fastadv.run.pseudo_labels``.
    """

    bn_passes: tuple[Pass, ...] = option(
        (ADVERSARIAL, NATURAL), "forward passes that move BatchNorm's running statistics"
    )

    def requires(self) -> frozenset[str]:
        return super().requires() | {"unlabelled_half"}
