"""A point near the image (TRADES)."""

from torch import Tensor

from fastadv.algorithms.contract import Batch
from fastadv.algorithms.start_points import near
from fastadv.algorithms.starts.begun import Begun


class Gaussian(Begun):
    """x0 = x + 0.001 N(0,1), not clipped to the box, as in the published code of TRADES."""

    def point(self, batch: Batch, restart: int = 0) -> Tensor:
        return near(batch, self.setup, restart)
