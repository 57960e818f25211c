"""The centre of the ball."""

from typing import ClassVar

from torch import Tensor

from fastadv.algorithms.contract import Batch
from fastadv.algorithms.start_points import in_ball
from fastadv.algorithms.starts.begun import Begun


class Center(Begun):
    """x0 = x, the image itself. A further restart begins at a random point of the ball."""

    begins_at_center: ClassVar[bool] = True

    def point(self, batch: Batch, restart: int = 0) -> Tensor:
        if restart:
            return in_ball(batch, self.setup, restart)
        # detach: a compiled step must not see x0 and x as one object in the first step
        return batch.x.detach()
