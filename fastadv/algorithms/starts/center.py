"""The centre of the ball."""

from typing import ClassVar

from torch import Tensor

from fastadv.algorithms.contract import Batch
from fastadv.algorithms.starts.begun import Begun


class Center(Begun):
    """x0 = x, the image itself."""

    at_center: ClassVar[bool] = True

    def point(self, batch: Batch, restart: int = 0) -> Tensor:
        # detach: a compiled step must not see x0 and x as one object in the first step
        return batch.x.detach()
