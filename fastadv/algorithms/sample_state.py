"""Per-sample state in image space: stored with padding, read and written through crop and flip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.contract import Setup
from fastadv.engine.noise import Stream
from fastadv.errors import UserError
from fastadv.threat import Threat

if TYPE_CHECKING:
    from fastadv.data.view import View


class SampleStore:
    """One padded image per training sample, (N,C,H+2 pad,W+2 pad), on the device.

    A batch reads the windows that its augmentation cut out (``view``: offsets in the padded image,
    and a mirror flag per sample); ``view=None`` is the centre without padding and mirroring. A
    window is written back to the pixels it was read from; pixels outside it keep their values.
    """

    def __init__(self, values: Tensor, pad: int) -> None:
        self.values = values
        self.pad = pad

    @classmethod
    def zeros(
        cls,
        num_samples: int,
        image_shape: tuple[int, int, int],
        pad: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> SampleStore:
        """A store of zeros for images of ``image_shape`` (C,H,W)."""
        channels, height, width = image_shape
        shape = (num_samples, channels, height + 2 * pad, width + 2 * pad)
        return cls(torch.zeros(shape, device=device, dtype=dtype), pad)

    @classmethod
    def for_run(cls, setup: Setup, pad: int) -> SampleStore:
        """A store of zeros for the images of the run. Raises ``UserError`` if the number of its
        training samples is not known."""
        count = sample_count(setup.num_samples, "This method")
        return cls.zeros(count, setup.image_shape, pad, setup.device, setup.dtype)

    def check_images(self, shape: Sequence[int], view: View | None) -> None:
        """Raise ``UserError`` for a batch of ``shape`` (B,C,h,w) that ``view`` cannot have cut out
        of the stored images. Without a view the batch must have the size of the images without
        padding."""
        channels, height, width = self.values.shape[1:]
        own = (channels, height - 2 * self.pad, width - 2 * self.pad)
        given = tuple(shape[1:])
        cut = given[0] == channels and given[1] <= height and given[2] <= width
        if given != own and not (view is not None and cut):
            raise UserError(
                f"This method stores perturbations of size {by(own)}, but these images have size "
                f"{by(given)}: use one size, or pass view=, the crop that made them."
            )

    def fill_normal(
        self, std: float, seed: int, offset: int, stream: Stream, ok: Tensor | None = None
    ) -> None:
        """Overwrite every row with std * N(0, I), drawn by the row's number; if ``ok`` (0-dim bool)
        is given, only where it is true. ``offset`` is the number of the draw."""
        for rows, drawn in self._drawn(kernels.noise_normal, seed, offset, stream):
            self._overwrite(rows, std * drawn, ok)

    def fill_signs(
        self, size: float, seed: int, offset: int, stream: Stream, ok: Tensor | None = None
    ) -> None:
        """Like ``fill_normal``, with ``size`` or -``size`` in every element, equally probable."""
        for rows, drawn in self._drawn(kernels.noise_uniform, seed, offset, stream):
            positive = (drawn >= 0).to(drawn.dtype)
            self._overwrite(rows, 2 * size * positive - size, ok)

    def _drawn(
        self, draw: Any, seed: int, offset: int, stream: Stream
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Row numbers and noise in their shape, some thousand rows at a time."""
        shape = tuple(self.values.shape[1:])
        for rows in torch.arange(len(self.values), device=self.values.device).split(4096):
            key = (seed, offset + stream.shift, stream.number)
            yield rows, draw(rows, shape, *key, self.values.dtype)

    def _overwrite(self, rows: Tensor, new: Tensor, ok: Tensor | None) -> None:
        self.values[rows] = new if ok is None else torch.where(ok, new, self.values[rows])

    def gather(self, index: Tensor, view: View | None, x: Tensor) -> Tensor:
        """The windows of the rows ``index`` (B,), cropped and mirrored by ``view``, in the shape
        (B,C,h,w) and the memory layout of the images ``x``."""
        top, left, flip = self._window(index, view)
        size = (x.shape[2], x.shape[3])
        last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        return kernels.crop_flip(self.values, index, top, left, flip, size, channels_last=last)

    def write(self, index: Tensor, view: View | None, window: Tensor, ok: Tensor) -> None:
        """Write ``window`` (B,C,h,w) back in place, only where ``ok`` (0-dim bool).

        The rows ``index`` (B,) must differ from each other.
        """
        top, left, flip = self._window(index, view)
        kernels.crop_flip_write(self.values, index, top, left, flip, window, ok)

    def start_from(
        self, index: Tensor, view: View | None, x: Tensor, scale: Tensor, threat: Threat
    ) -> tuple[Tensor, Tensor]:
        """(box(x + clamp(scale * w, +-eps)), w), both (B,C,h,w), where w are the windows of the
        rows ``index`` (B,). ``scale`` is 0-dim; ``threat`` is one of Linf."""
        windows = (self.values, index, *self._window(index, view), x, scale)
        if threat.by_channel:
            start, window = kernels.crop_flip_add(*windows, inf, -inf, inf)
            return threat.project(start, x), window
        limits: Any = (threat.eps, threat.low, threat.high)  # numbers or tensors of radii
        return kernels.crop_flip_add(*windows, *limits)

    def ascend(
        self, index: Tensor, view: View | None, gradient: Tensor, rate: Tensor, ok: Tensor
    ) -> None:
        """w <- clamp(w + rate sign(gradient), +-1) in the windows, in place, only where ``ok``.
        ``gradient`` is (B,C,h,w), ``rate`` 0-dim."""
        top, left, flip = self._window(index, view)
        kernels.crop_flip_ascend(
            self.values, index, top, left, flip, gradient, rate, low=-1.0, high=1.0, ok=ok
        )

    def _window(self, index: Tensor, view: View | None) -> tuple[Tensor, Tensor, Tensor]:
        if view is not None:
            return view.top, view.left, view.flip
        centre = torch.full_like(index, self.pad)
        return centre, centre, torch.zeros_like(index, dtype=torch.bool)


def by(shape: Sequence[int]) -> str:
    """A shape as text for messages: (3, 32, 32) becomes 3x32x32."""
    return "x".join(map(str, shape))


def require_size(x: Tensor, setup: Setup, keeps: str) -> None:
    """Raise ``UserError`` for images ``x`` (B,C,h,w) of another size than the run's. ``keeps`` is
    the beginning of the sentence: what the part keeps in that size."""
    own, given = setup.image_shape, tuple(x.shape[1:])
    if given != own:
        raise UserError(
            f"{keeps} of size {by(own)}, but these images have size {by(given)}: use one size, or "
            "build one step per size."
        )


def sample_count(num_samples: int | None, method: str) -> int:
    """``num_samples``; raises ``UserError`` if it is None. ``method`` is named in the error."""
    if num_samples is None:
        raise UserError(
            f"{method} stores state for every training sample: "
            "pass num_samples=, the size of the training set."
        )
    return num_samples
