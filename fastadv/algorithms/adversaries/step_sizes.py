"""Step sizes that are learned during training by gradient ascent with momentum (APART)."""

from __future__ import annotations

import torch
from torch import Tensor

CYCLED = 0.1  # the triangular cycle lowers the momentum by this at its peak


def usual_rate(eps: float, updates: int, momentum: float) -> float:
    """The peak learning rate of the step sizes if no published one exists.

    With this rate a constant gradient of 2 over ``updates`` updates of a triangular schedule (mean
    rate: half the peak) with a constant ``momentum`` moves a step size from 0 to eps:
    peak/2 * updates / (1 - momentum) * 2 = eps. Fewer updates or a larger ball need a larger rate.
    The paper's CIFAR rate of 5e-8 follows from the same equation with the larger gradient of those
    images (a sum over 3,072 pixels).
    """
    return eps * (1 - momentum) / max(updates, 1)


class StepSizes:
    """n step sizes in one tensor, which ascend the loss by SGD with momentum and weight decay.

    alpha <- alpha + lr * buffer, buffer <- momentum * buffer + (gradient - decay * alpha), which
    is ``torch.optim.SGD`` on the negated gradients (APART, Alg. 1 line 8, with the released
    code's decay: decay * alpha instead of the 0/0 of the printed form). ``values`` is (n,) float32
    or wider.
    """

    def __init__(self, values: Tensor, lr: float, decay: float, momentum: float) -> None:
        self.values = values
        self.buffer = torch.zeros_like(values)
        self.rate = torch.zeros((), device=values.device, dtype=values.dtype)
        self.keep = torch.zeros((), device=values.device, dtype=values.dtype)
        self.lr, self.decay, self.momentum = lr, decay, momentum

    def schedule(self, update: int, total: int | None) -> None:
        """Set the rate and the momentum of update number ``update`` (from 0).

        The schedule is triangular over ``total`` updates: the rate goes 0 -> lr -> 0 and the
        momentum m -> m - 0.1 -> m, as in ``CyclicLR`` with its defaults. With None both are
        constant.
        """
        rising = 1.0
        momentum = self.momentum
        if total is not None:
            rising = max(0.0, 1 - abs(2 * update / total - 1))
            momentum -= CYCLED * rising
        self.rate.fill_(self.lr * rising)
        self.keep.fill_(momentum)

    @torch.no_grad()
    def ascend(self, gradient: Tensor, ok: Tensor) -> None:
        """One ascent step along ``gradient`` (n,), only where ``ok`` (0-dim bool)."""
        push = gradient.to(self.values.dtype) - self.decay * self.values
        buffer = self.keep * self.buffer + push
        self.buffer.copy_(torch.where(ok, buffer, self.buffer))
        self.values.add_(torch.where(ok, self.rate * buffer, 0.0))
