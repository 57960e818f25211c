"""What was drawn for each image of a batch: the crop and the flip."""

from typing import NamedTuple

from torch import Tensor


class View(NamedTuple):
    """Crop and flip of each image of a batch: ``top`` and ``left`` (B,) int64, ``flip`` (B,) bool.

    ``top`` and ``left`` are offsets in pixels into the image padded by ``pad`` on each side, so
    they lie in ``[0, 2 * pad]``, and ``pad`` means "not moved". The image is cropped first and then
    flipped horizontally. Parts that store a perturbation per sample use the view to align it with
    the pixels of the original image.
    """

    top: Tensor
    left: Tensor
    flip: Tensor

    def rows(self, start: int, stop: int) -> "View":
        """The view of the batch's samples ``start`` to ``stop - 1``, without a copy."""
        return View(self.top[start:stop], self.left[start:stop], self.flip[start:stop])
