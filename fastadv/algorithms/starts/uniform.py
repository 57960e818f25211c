"""A random point of the ball."""

from torch import Tensor

from fastadv.algorithms.contract import Batch
from fastadv.algorithms.start_points import in_ball
from fastadv.algorithms.starts.begun import Begun


class UniformStart(Begun):
    """x0 = box(x + U(-eps, eps)) in Linf. In L2 a Gaussian direction with a radius uniform in
    [0, eps] (locuslab/robust_overfitting)."""

    def point(self, batch: Batch, restart: int = 0) -> Tensor:
        return in_ball(batch, self.setup, restart)
