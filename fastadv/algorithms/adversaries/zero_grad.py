"""ZeroGrad: F+FGSM that leaves the pixels with small gradients alone (Golgooni et al., 2023)."""

from typing import ClassVar

import torch
from torch import Tensor

from fastadv.algorithms.adversaries.fast import Fast
from fastadv.declared import Share, option
from fastadv.threat import Threat


class ZeroGrad(Fast):
    """x' = box(ball(x0 + alpha sign g)), x0 uniform in the ball, alpha = 2 eps.

    g is the gradient at x0, 0 where its absolute value is below the ``zero_share`` quantile of
    those of its image (rohban-lab/catastrophic_overfitting, train_cifar.py: qfgsm). The quantile is
    interpolated linearly, as ``torch.quantile`` does it, which takes no batch of large images.
    Published shares on CIFAR-10 at 8/255: 0.35 (FastAT_Benchmark), 0.4 (the authors' default).
    """

    usual_alpha: ClassVar[float] = 2.0

    zero_share: Share = option(
        0.35, "share of each image's gradient, the smallest in absolute value, that is set to 0"
    )

    def followed(self, gradient: Tensor, x_adv: Tensor, threat: Threat) -> Tensor:
        sizes = gradient.abs()
        limits = quantile(sizes.flatten(1), self.zero_share)[:, None, None, None]
        return torch.where(sizes < limits, 0.0, gradient)


def quantile(values: Tensor, share: float) -> Tensor:
    """The ``share`` quantile (B,) of each row of ``values`` (B,n), with linear interpolation."""
    ordered = values.sort(1).values
    place = share * (values.shape[1] - 1)
    below = int(place)
    above = min(below + 1, values.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], place - below)
