"""What was drawn for each image of a batch: where it was cropped and whether it was flipped."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class View(NamedTuple):
    """Crop and flip of a batch; ``top`` and ``left`` (B,) int64, ``flip`` (B,) bool.

    Offsets are in the image padded by ``pad`` on each side, so they lie in ``[0, 2 * pad]`` and
    ``pad`` means "not moved". The crop comes first, then the flip from left to right.
    """

    top: Tensor
    left: Tensor
    flip: Tensor

    def rows(self, start: int, stop: int) -> "View":
        """The view of the batch's samples ``start`` to ``stop - 1``; no copy."""
        return View(self.top[start:stop], self.left[start:stop], self.flip[start:stop])


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch as every loader gives it; unpacks to ``index, image, label, view``.

    ``index`` (B,) int64: rows of the training set. ``image`` (B,C,H,W) float in [0,1].
    ``label`` (B,) int64. ``view``: what was drawn for ``image``. ``second``: image and view of a
    second, independent draw for the same samples, when the loader was asked for two views.
    """

    index: Tensor
    image: Tensor
    label: Tensor
    view: View
    second: tuple[Tensor, View] | None = None

    def __iter__(self) -> Iterator[Tensor | View]:
        return iter((self.index, self.image, self.label, self.view))


def unit_images(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images of bytes as numbers in [0,1]: x / 255 in float32, then rounded to ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    return images.to(wide).div_(255).to(dtype)
