"""The random start of the memorization paper's code."""

from torch import Tensor

from fastadv.algorithms.contract import Batch
from fastadv.algorithms.start_points import in_ball, near
from fastadv.algorithms.starts.begun import Begun


class Unclipped(Begun):
    """x0 = x + U(-eps, eps) in Linf, not clipped to the range of images; in L2 x + 0.001 N(0,1)
    (dongyp13/memorization-AT)."""

    def point(self, batch: Batch, restart: int = 0) -> Tensor:
        if batch.threat.norm == "l2":
            return near(batch, self.setup, restart)
        return in_ball(batch._replace(threat=batch.threat.unboxed()), self.setup, restart)
