"""The loader for data that fits on the device: no worker, no copy, no loop over samples."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastadv.data import draws
from fastadv.data.batch import LoaderBatch
from fastadv.data.pixels import unit_images
from fastadv.data.view import View
from fastadv.errors import UserError, unknown
from fastadv.kernels import crop_flip

PADDINGS = ("constant", "grey", "reflect")
GREY = 0.5  # the padding value of APART and ATTA


class DeviceLoader:
    """Batches from uint8 images that are stored on the device.

    ``images`` (N,C,H,W) uint8 and ``labels`` (N,) int64 are moved to ``device`` once. Each epoch
    visits ``indices`` (rows of ``images``; all by default) in an order that depends only on
    ``seed`` and the epoch; crop and flip of a sample depend only on ``seed``, the epoch and its
    row. So an epoch that is resumed at any batch continues bit for bit, and the view of a sample
    does not depend on the number of processes.

    ``batch_size`` is per process. With ``world_size`` processes a global batch consists of
    ``world_size * batch_size`` consecutive samples of one common order, and process ``rank`` takes
    its part of it. All processes have the same number of batches, of the same sizes.

    The last batch of an epoch holds the remaining samples, divided equally (fewer than
    ``world_size`` samples are skipped in this epoch). It is dropped if ``drop_last`` is set, and
    also if it would hold a single sample, from which BatchNorm cannot compute statistics (unless
    ``batch_size`` is 1). So there are at most two batch shapes. With ``whole`` no sample is skipped
    that one process would take: the parts of the last batch differ by a pair, and may be empty.

    ``pad`` (pixels), ``padding`` (``"constant"``: black, ``"grey"``: 0.5, ``"reflect"``) and
    ``flip`` are the usual augmentation. ``views=2`` draws a second view into ``batch.second``.
    Images are ``dtype`` in [0,1], contiguous or, with ``channels_last``, in that layout.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        pad: int = 0,
        flip: bool = False,
        padding: str = "constant",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        drop_last: bool = False,
        views: int = 1,
        indices: Tensor | None = None,
        rank: int = 0,
        world_size: int = 1,
        whole: bool = False,
    ) -> None:
        check_options(batch_size, pad, padding, views, images.shape[-2:], rank, world_size)
        rows = torch.arange(len(images)) if indices is None else indices
        self.seed, self.pad, self.flip, self.padding = seed, pad, flip, padding
        self.dtype, self.channels_last, self.views = dtype, channels_last, views
        self.batch_size = batch_size
        self.images = images.to(device)
        self.labels = labels.to(device)
        self.rows = rows.to(device)
        self.shard = Shard(len(rows), batch_size, rank, world_size, drop_last, whole)

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.shard.sizes)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[LoaderBatch]:
        """The batches of ``epoch``, starting at batch ``start_batch``."""
        rows = self.shard.part(draws.shuffled(self.rows, draws.ORDER, self.seed, epoch))
        return self.batches(rows, self.shard.sizes, epoch, start_batch)

    def batches(
        self, rows: Tensor, sizes: list[int], epoch: int, start_batch: int
    ) -> Iterator[LoaderBatch]:
        """Batches of ``sizes`` over ``rows``, in that order, with the views of ``epoch``."""
        views = draw_views(rows, self.seed, epoch, self.pad, self.flip, self.views)
        start = sum(sizes[:start_batch])
        for size in sizes[start_batch:]:
            stop = start + size
            index = rows[start:stop]
            drawn = [view.rows(start, stop) for view in views]
            crops = [self._crop(index, view) for view in drawn]
            second = (crops[1], drawn[1]) if self.views == 2 else None
            yield LoaderBatch(index, crops[0], self.labels[index], drawn[0], second)
            start = stop

    def _crop(self, index: Tensor, view: View) -> Tensor:
        return crop_images(
            self.images, index, view, self.pad, self.padding, self.dtype, self.channels_last
        )


class Shard:
    """The part of an epoch's order that one process takes, and the sizes of its batches.

    Raises ``UserError`` if there is no batch.
    """

    def __init__(
        self,
        total: int,
        batch_size: int,
        rank: int,
        world_size: int,
        drop_last: bool,
        whole: bool = False,
    ) -> None:
        full, rest = divmod(total, batch_size * world_size)
        least = rest if whole else rest // world_size  # of which BatchNorm takes the statistics
        single = least == 1 and batch_size * (world_size if whole else 1) > 1
        if drop_last or single or not least:
            rest = 0
        elif not whole:
            rest = least * world_size
        # In pairs, so that two images that are mixed are in one part (``mixing.py``).
        each = 2 if whole else 1
        count = -(-rest // each)
        first, last = (each * (count * part // world_size) for part in (rank, rank + 1))
        self._last = (first, min(last, rest))
        self.sizes = [batch_size] * full + [self._last[1] - self._last[0]] * bool(rest)
        if not self.sizes:
            raise UserError(
                f"{total} training images give no batch of {batch_size} for each of {world_size} "
                "processes; choose a smaller batch size."
            )
        self._grid = (full, world_size, batch_size)
        self._rank = rank

    def part(self, order: Tensor) -> Tensor:
        """This process's rows of ``order`` (N,), batch after batch."""
        full, world_size, batch_size = self._grid
        end = full * world_size * batch_size
        whole = order[:end].view(self._grid)[:, self._rank].reshape(-1)
        first, last = self._last
        return torch.cat([whole, order[end + first : end + last]])


def draw_views(rows: Tensor, seed: int, epoch: int, pad: int, flip: bool, views: int) -> list[View]:
    """One or two independent views of the samples ``rows`` in ``epoch``."""
    streams = (draws.VIEW, draws.SECOND_VIEW)[:views]
    return [draws.draw_view(rows, seed, epoch, pad, flip, stream) for stream in streams]


def crop_images(
    store: Tensor,
    index: Tensor,
    view: View,
    pad: int,
    padding: str,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Rows ``index`` of ``store`` (N,C,H,W) uint8, cropped and flipped: (B,C,H,W) in [0,1]."""
    return crop_flip(
        store,
        index,
        view.top - pad,
        view.left - pad,
        view.flip,
        (store.shape[-2], store.shape[-1]),
        dtype=dtype,
        fill=GREY if padding == "grey" else 0.0,
        padding="reflect" if padding == "reflect" else "constant",
        channels_last=channels_last,
    )


def check_options(
    batch_size: int,
    pad: int,
    padding: str,
    views: int,
    size: torch.Size,
    rank: int,
    world_size: int,
) -> None:
    """Raise ``UserError`` for invalid loader options."""
    if batch_size < 1:
        raise UserError(f"The batch size must be at least 1, not {batch_size}.")
    if not 0 <= pad < min(size):
        raise UserError(
            f"pad must be at least 0 and smaller than the image's {min(size)} pixels, not {pad}: a "
            "crop could miss the image, and there are not more pixels to reflect."
        )
    if padding not in PADDINGS:
        raise unknown("padding", padding, PADDINGS)
    if views not in (1, 2):
        raise UserError(f"A loader draws 1 or 2 views of a sample, not {views}.")
    if not 0 <= rank < world_size:
        raise UserError(f"Process {rank} of {world_size} does not exist; ranks count from 0.")


def eval_batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    device: torch.device | str = "cpu",
    channels_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """``(image, label)`` in order, not augmented: (B,C,H,W) float32 in [0,1] and
    (B,) int64.

    ``images`` (N,C,H,W) uint8. The last batch holds the remaining images.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for image, label in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        yield unit_images(image.to(device), torch.float32, layout), label.to(device)
