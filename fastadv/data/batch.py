"""A batch as the loaders yield it."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from fastadv.data.view import View


@dataclass(frozen=True, slots=True)
class LoaderBatch:
    """One batch of any loader; unpacks to ``index, image, label, view``.

    ``index`` (B,) int64: rows of the training set. ``image`` (B,C,H,W) float in [0,1].
    ``label`` (B,) int64. ``view``: the crop and flip of ``image``. ``second``: image and view of a
    second, independent draw for the same samples, if the loader has ``views=2``.
    """

    index: Tensor
    image: Tensor
    label: Tensor
    view: View
    second: tuple[Tensor, View] | None = None

    def __iter__(self) -> Iterator[Tensor | View]:
        return iter((self.index, self.image, self.label, self.view))
