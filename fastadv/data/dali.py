"""Streams image trees through NVIDIA DALI: decoded and resized during training, not stored.

DALI reads, decodes and resizes (on the GPU if there is one) and prefetches batches. The file names
of each batch are passed to it batch by batch, and crop and flip use the kernel of ``DeviceLoader``.
So both loaders yield the same samples in the same order with the same views, and a position in an
epoch is two numbers: resuming exactly needs no state of DALI, even with another number of
processes. Random crops that are resized are an exception: DALI takes them from the files, whose
pixels ``DeviceLoader`` does not have.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastadv.data import draws
from fastadv.data.batch import LoaderBatch
from fastadv.data.broken import BrokenImages
from fastadv.data.decode import Format, UnreadableImage, header, undecodable, unreadable
from fastadv.data.device_loader import Shard, check_options, crop_images, draw_views
from fastadv.data.pixels import unit_images
from fastadv.data.resized_crop import Boxes, draw_boxes
from fastadv.errors import UserError
from fastadv.storage.printable import printable


def _name_the_first(files: list[str]) -> None:
    header(files[0])
    raise unreadable(files[0])


class DaliLoader:
    """Batches from image files, with the options of ``DeviceLoader``.

    ``files`` and ``labels``: N paths and classes. ``form``: height, width and channels of the
    decoded images (scaled to cover it, then center-cropped). ``device``: the device of the batches;
    on a CPU DALI also decodes there. ``threads``: decoding threads (default: all cores, at most 8).
    ``prefetch``: number of batches decoded ahead, also across the end of an epoch.
    ``resized_crop``: each view is a random crop of the whole file (``draw_boxes``), scaled to
    ``form``. ``absent`` are rows whose images are not there: another one of the batch takes their
    place (``LeavingOut`` drops it). ``on_broken`` is told which files could not be decoded, and
    raises; if it returns, an epoch goes on, with their rows in ``absent``. Raises ``UserError`` if
    DALI is not installed or, without ``on_broken``, if an image cannot be read; the message names
    it.
    """

    def __init__(
        self,
        files: Sequence[str],
        labels: Sequence[int],
        form: Format,
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
        threads: int | None = None,
        prefetch: int = 2,
        resized_crop: bool = False,
        absent: set[int] | None = None,
        on_broken: Callable[[list[str]], None] = _name_the_first,
    ) -> None:
        size = torch.Size((form.height, form.width))
        check_options(batch_size, pad, padding, views, size, rank, world_size)
        self.files, self.form, self.device = files, form, torch.device(device)
        self.seed, self.pad, self.flip, self.padding = seed, pad, flip, padding
        self.dtype, self.channels_last, self.views = dtype, channels_last, views
        self.batch_size = batch_size
        self.labels = torch.as_tensor(labels, dtype=torch.int64).to(self.device)
        self.rows = torch.arange(len(files)) if indices is None else indices.cpu()
        self.shard = Shard(len(self.rows), batch_size, rank, world_size, drop_last, whole)
        self._workers = (threads or min(os.cpu_count() or 1, 8), prefetch)
        self._place = torch.arange(batch_size, device=self.device)
        self._stream: _Stream | None = None
        self._crops = resized_crop
        self._sizes = np.zeros((len(files), 2), np.int32)  # of files whose headers were checked
        self._position = (-1, -1)  # the next batch of the stream
        self._absent = set() if absent is None else absent
        self._on_broken = on_broken
        import_dali()

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.shard.sizes)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[LoaderBatch]:
        """The batches of ``epoch``, starting at batch ``start_batch``."""
        rows = self._order(epoch).to(self.device)
        views = draw_views(rows, self.seed, epoch, self.pad, self.flip, self.views)
        start = sum(self.shard.sizes[:start_batch])
        for number in range(start_batch, len(self)):
            stop = start + self.shard.sizes[number]
            index, drawn = rows[start:stop], [view.rows(start, stop) for view in views]
            stores = self._take(epoch, number) if stop > start else self._none(epoch, number)
            crops = [
                crop_images(
                    stores[k % len(stores)],  # one decoded batch for all views, or one for each
                    self._place[: stop - start],
                    view,
                    self.pad,
                    self.padding,
                    self.dtype,
                    self.channels_last,
                )
                for k, view in enumerate(drawn)
            ]
            second = (crops[1], drawn[1]) if self.views == 2 else None
            yield LoaderBatch(index, crops[0], self.labels[index], drawn[0], second)
            start = stop

    def ordered(self) -> Iterator[tuple[Tensor, Tensor]]:
        """``(image, label)`` of all selected rows, in order, not augmented, for evaluation."""
        parts = self.rows.split(self.batch_size)
        stream = self._open(iter(parts), [])
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        for rows in parts:
            try:
                images = stream.take()[0]
            except _BrokenRows as found:
                files = [self.files[row] for row in found.rows]
                self._on_broken(files)
                raise BrokenImages(
                    f"{printable(files[0])} broke while it was evaluated; start again: it is then "
                    "left out.",
                    files,
                ) from None
            yield unit_images(images, self.dtype, layout), self.labels[rows.to(self.device)]

    def _order(self, epoch: int) -> Tensor:
        return self.shard.part(draws.shuffled(self.rows, draws.ORDER, self.seed, epoch))

    def _take(self, epoch: int, number: int) -> list[Tensor]:
        here, stream = (epoch, number), self._stream
        after = (epoch, number + 1) if number + 1 < len(self) else (epoch + 1, 0)
        while True:
            if stream is None or self._position != here:
                streams = (draws.AUGMENT, draws.SECOND_AUGMENT)[: self.views] if self._crops else ()
                boxes = [self._boxes(epoch, number, stream) for stream in streams]
                stream = self._open(self._from(epoch, number), boxes)
            self._stream, self._position = stream, after
            try:
                return stream.take()
            except _BrokenRows as found:
                self._on_broken([self.files[row] for row in found.rows])
                self._absent.update(found.rows)
                self._stream = stream = None  # it has decoded ahead with them

    def _none(self, epoch: int, number: int) -> list[Tensor]:
        """The images of a batch without any, which the stream passes over."""
        if self._position == (epoch, number):
            self._position = (epoch, number + 1) if number + 1 < len(self) else (epoch + 1, 0)
        form = self.form
        shape = (0, form.channels, form.height, form.width)
        return [torch.empty(shape, dtype=torch.uint8, device=self.device)]

    def _from(self, epoch: int, number: int) -> Iterator[Tensor]:
        """The rows of every batch from this position on, through all following epochs."""
        while True:
            parts = self._order(epoch).split(self.shard.sizes)[number:]
            yield from (rows for rows in parts if len(rows))
            epoch, number = epoch + 1, 0

    def _boxes(self, epoch: int, number: int, stream: int) -> Iterator[Boxes]:
        """The crops of every batch from this position on; a batch's files have been checked."""
        while True:
            for rows in self._order(epoch).split(self.shard.sizes)[number:]:
                if not len(rows):
                    continue
                height, width = torch.from_numpy(self._sizes[rows.numpy()]).long().unbind(1)
                yield draw_boxes(rows, height, width, stream, self.seed, epoch)
            epoch, number = epoch + 1, 0

    def _open(self, schedule: Iterator[Tensor], boxes: list[Iterator[Boxes]]) -> "_Stream":
        return _Stream(
            self.files,
            self._sizes,
            schedule,
            boxes,
            self.form,
            self.batch_size,
            self.device,
            self._workers,
            self._absent,
        )


class _BrokenRows(Exception):
    """Images of the ``rows`` cannot be decoded."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(rows)
        self.rows = rows


class _Stream:
    """One DALI pipeline that decodes the batches of ``schedule`` in order: whole images, or one
    crop of each for each of ``boxes``. ``sizes`` is filled with what the headers say."""

    def __init__(
        self,
        files: Sequence[str],
        sizes: np.ndarray,
        schedule: Iterator[Tensor],
        boxes: list[Iterator[Boxes]],
        form: Format,
        batch_size: int,
        device: torch.device,
        workers: tuple[int, int],
        absent: set[int],
    ) -> None:
        self._form, self._absent = form, absent
        self._files, self._schedule, self._device = files, schedule, device
        self._sizes, self._boxes = sizes, boxes
        self._ahead: deque[list[int]] = deque()
        self._pipeline = _pipeline(self._next, len(boxes), form, batch_size, device, *workers)

    def take(self) -> list[Tensor]:
        """The next batch, (B,C,H,W) uint8 on the device, once or once for each crop; copies that
        DALI does not modify."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            outputs = [output.as_tensor() for output in self._pipeline.run()]
        except (RuntimeError, UnreadableImage) as error:
            broken = self._broken()
            if not broken:
                raise
            raise _BrokenRows(broken) from error
        self._ahead.popleft()
        copies = []
        for decoded in outputs:
            images = torch.empty(decoded.shape(), dtype=torch.uint8, device=self._device)
            copies.append(feed_ndarray(decoded, images, cuda_stream=stream))
        return copies

    def _broken(self) -> list[int]:
        """The rows, of those that were to be decoded, whose images cannot be."""
        rows = [row for rows in self._ahead for row in rows if row not in self._absent]
        found = [row for row in rows if undecodable(self._files[row])]
        return found or [row for row in rows if not self._decodes(row)]

    def _decodes(self, row: int) -> bool:
        """True if DALI decodes the image of ``row``, alone; Pillow decodes more kinds than it."""
        schedule, workers = iter([torch.tensor([row])]), (1, 1)
        alone = _Stream(
            self._files, self._sizes, schedule, [], self._form, 1, self._device, workers, set()
        )
        try:
            alone._pipeline.run()
        except RuntimeError:
            return False
        return True

    def _next(self) -> tuple[list[np.ndarray], ...]:
        """The paths of a batch; then, for each crop, its corners (top, left) and sizes."""
        rows = next(self._schedule).tolist()
        self._ahead.append(rows)
        taken = self._with_substitutes(rows) if self._absent else rows
        for row, read in zip(rows, taken, strict=True):
            if not self._sizes[read, 0]:
                # DALI would allocate any size the header asks for.
                self._sizes[read] = header(self._files[read])[:2]
            self._sizes[row] = self._sizes[read]  # the crop of `row` is taken from it
        paths = [np.frombuffer(os.fsencode(self._files[row]), np.uint8) for row in taken]
        drawn = [next(boxes) for boxes in self._boxes]
        pairs = [pair for box in drawn for pair in ((box.top, box.left), (box.height, box.width))]
        return paths, *([*torch.stack(pair, 1).int().numpy()] for pair in pairs)

    def _with_substitutes(self, rows: list[int]) -> list[int]:
        """``rows`` with another row in place of each absent one."""
        every = range(len(self._files))
        present = next(row for row in (*rows, *every) if row not in self._absent)
        return [present if row in self._absent else row for row in rows]


def _pipeline(
    source: Callable[[], tuple[list[np.ndarray], ...]],
    crops: int,
    form: Format,
    batch_size: int,
    device: torch.device,
    threads: int,
    prefetch: int,
) -> Any:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=torch.cuda.current_device() if on_gpu and device.index is None else device.index,
        prefetch_queue_depth=prefetch,
    )
    size = (form.height, form.width)
    with pipeline:
        kinds = [types.UINT8] + [types.INT32] * 2 * crops
        paths, *places = fn.external_source(source, len(kinds), dtype=kinds, ndim=[1] * len(kinds))
        encoded = fn.io.file.read(paths)
        image = fn.decoders.image(
            encoded,
            device="mixed" if on_gpu else "cpu",
            output_type=types.GRAY if form.channels == 1 else types.RGB,
            jpeg_fancy_upsampling=True,  # as Pillow does, so that cache and stream agree
            adjust_orientation=False,
        )
        if crops:
            corners = zip(places[::2], places[1::2], strict=True)
            cut = [fn.slice(image, start, shape, axes=(0, 1)) for start, shape in corners]
            images = [fn.resize(each, size=size) for each in cut]
        else:
            images = [fn.crop(fn.resize(image, size=size, mode="not_smaller"), crop=size)]
        pipeline.set_outputs(*(fn.transpose(each, perm=[2, 0, 1]) for each in images))
    pipeline.build()
    return pipeline


def import_dali() -> ModuleType:
    """The module ``nvidia.dali``; ``UserError`` with the install command if it is missing."""
    try:
        import nvidia.dali
    except ImportError as error:
        raise UserError(
            "--loader dali needs NVIDIA DALI; install it with `pip install nvidia-dali-cuda130` "
            "(nvidia-dali-cuda120 for a CUDA 12 driver), or use --loader device."
        ) from error
    return nvidia.dali
