"""Decodes image files to arrays, and finds the common format of a set of files."""

from __future__ import annotations

import os
import stat
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from os import cpu_count
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from PIL import Image, ImageOps

from fastadv.errors import UserError
from fastadv.storage.files import flags
from fastadv.storage.printable import printable

_GREY = ("1", "L", "LA")
_COLOUR = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")

# The formats of torchvision's suffixes. Pillow chooses the decoder by content, not by name, and
# would run an external program for PostScript.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")

# The last bytes of a whole file; a WebP says its length at its beginning.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "WEBP": b""}

# A header of a few bytes can request gigabytes. Photographs have fewer pixels than this.
MOST_PIXELS = 2**25
# No format needs more for that number of pixels: four channels of one byte, and metadata.
_MOST_BYTES = 4 * MOST_PIXELS + 2**20
# Memory limit in bytes for images that are being decoded or waiting to be read.
IN_FLIGHT = 2**28

_CHUNK = 32

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Format:
    """The format to decode images to: height, width and 1 (grey) or 3 (RGB) channels."""

    height: int
    width: int
    channels: int

    @property
    def bytes_each(self) -> int:
        """Bytes of one image of uint8."""
        return self.height * self.width * self.channels


@dataclass(frozen=True)
class Common:
    """The common format of a set of images.

    ``odd``: number of images of another size. ``coloured``: number that are not grey.
    """

    form: Format
    odd: int
    coloured: int


class _Room:
    """A memory budget in bytes shared by threads; a single request may exceed it."""

    def __init__(self, size: int) -> None:
        self._free, self._size = size, size
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, wanted: int) -> Iterator[None]:
        """Wait until ``wanted`` bytes are free, and reserve them in the block."""
        wanted = min(wanted, self._size)
        with self._changed:
            self._changed.wait_for(lambda: wanted <= self._free)
            self._free -= wanted
        try:
            yield
        finally:
            with self._changed:
                self._free += wanted
                self._changed.notify_all()


_room = _Room(IN_FLIGHT)


def decode(file: str, form: Format) -> np.ndarray:
    """The image ``file`` as uint8 (C,H,W).

    An image of another size is scaled to cover ``form`` and center-cropped. Raises ``UserError``
    with the file's name if it cannot be read.
    """
    mode = "L" if form.channels == 1 else "RGB"
    with _opened(file) as source, _room.taken(8 * source.width * source.height):
        source.load()
        image = source if source.mode == mode else source.convert(mode)
        if image.size != (form.width, form.height):
            image = ImageOps.fit(image, (form.width, form.height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
    return pixels[None] if form.channels == 1 else pixels.transpose(2, 0, 1)


def common_format(files: list[str], image_size: int | None = None) -> Common:
    """The format to decode ``files`` to: ``image_size`` squared, or the size of most of them.

    Images are grey only if every one is. Only headers are read. Raises ``UserError`` if no
    size is that of more than half of them: any choice would be a surprise.
    """
    sizes: Counter[tuple[int, int]] = Counter()
    coloured = 0
    for height, width, is_grey in in_threads(header, files):
        sizes[height, width] += 1
        coloured += not is_grey
    (height, width), most = sizes.most_common(1)[0]
    if image_size:
        height, width = image_size, image_size
    elif 2 * most <= len(files):
        sides = sorted(min(size) for size in sizes.elements())
        raise UserError(
            f"These {len(files)} images have {len(sizes)} sizes, none of them the size of more "
            f"than half: give the size to scale to, such as --image-size {sides[len(sides) // 2]}."
        )
    form = Format(height, width, 3 if coloured else 1)
    return Common(form, len(files) - sizes[height, width], coloured)


def in_threads(
    work: Callable[[Item], Result], items: list[Item], bytes_each: int = 1
) -> Iterator[Result]:
    """``map(work, items)`` on a pool of threads, in order, a bounded number of items ahead.

    Pillow releases the interpreter lock while it decodes. Items are submitted in chunks: one future
    per item costs more than decoding a small image. Waiting results, of ``bytes_each`` bytes, use
    at most ``IN_FLIGHT`` bytes.
    """
    threads = min(cpu_count() or 1, 8)  # more threads only contend for the lock
    size = max(1, min(_CHUNK, IN_FLIGHT // (2 * threads * bytes_each)))
    ahead_of = max(1, min(2 * threads, IN_FLIGHT // (size * bytes_each)))
    chunks = iter([items[n : n + size] for n in range(0, len(items), size)])
    with ThreadPoolExecutor(threads) as pool:
        ahead = deque(pool.submit(_map, work, chunk) for chunk in islice(chunks, ahead_of))
        while ahead:
            done = ahead.popleft().result()
            ahead.extend(pool.submit(_map, work, chunk) for chunk in islice(chunks, 1))
            yield from done


def _map(work: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [work(item) for item in items]


def undecodable(file: str) -> bool:
    """True if ``file`` cannot be decoded."""
    try:
        decode(file, Format(1, 1, 3))
    except UnreadableImage:
        return True
    return False


def ends_early(file: str) -> bool:
    """True if the image ``file`` does not end as its format does, so that it may be cut off; only
    its header and its last bytes are read. Raises ``UserError`` if the header is damaged."""
    with _opened(file) as source:
        kind, raw = source.format or "", cast(Any, source).fp  # Pillow's stubs leave it out
        if kind not in _ENDS:
            return True
        raw.seek(0, os.SEEK_END)
        size = raw.tell()
        if kind == "WEBP":
            raw.seek(4)
            return int.from_bytes(raw.read(4), "little") + 8 > size
        raw.seek(max(0, size - len(_ENDS[kind])))
        return bool(raw.read() != _ENDS[kind])


class UnreadableImage(UserError):
    """The image ``file`` cannot be decoded; the message names it. ``why``: in few words, which
    follow the name, and then ``rest``."""

    def __init__(self, file: str, why: str, rest: str) -> None:
        super().__init__(f"{printable(file)} {why}{rest}")
        self.file = file
        self.why = why


def unreadable(file: str) -> UnreadableImage:
    """The error for an image file that cannot be decoded."""
    if not Path(file).is_file():
        return UnreadableImage(file, "is missing", ".")
    return UnreadableImage(
        file,
        "is not a readable JPEG or PNG image",
        " (nor another that fastadv reads); repair or remove it.",
    )


def header(file: str) -> tuple[int, int, bool]:
    """Height and width in pixels, and True if the image is grey; nothing is decoded."""
    with _opened(file) as source:
        return source.height, source.width, source.mode in _GREY


@contextmanager
def _opened(file: str) -> Iterator[Image.Image]:
    """The image in ``file``, with its header read and its size checked; errors name the file."""
    try:
        with open(file, "rb", opener=_without_waiting) as raw:
            found = os.fstat(raw.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UnreadableImage(file, "is not a regular file", "; remove it.")
            if found.st_size > _MOST_BYTES:
                raise UnreadableImage(
                    file,
                    f"takes {found.st_size / 1e6:.0f} MB",
                    f", more than an image of {MOST_PIXELS / 1e6:.0f} million pixels can; scale it "
                    "down.",
                )
            # Pillow's WebP reader allocates the pixels when it opens a file.
            _check_size(file, *_early_size(raw.read(30)))
            raw.seek(0)
            with Image.open(raw, formats=_FORMATS) as source:
                _check_size(file, *source.size)
                _check_mode(file, source.mode)
                yield source
    except (UserError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImage(
            file,
            f"has more than the {MOST_PIXELS / 1e6:.0f} million pixels that are decoded",
            "; scale it down or remove it.",
        ) from error
    except Exception as error:  # decoders raise anything for a damaged or malicious file
        raise unreadable(file) from error


def _without_waiting(path: str, how: int) -> int:
    # Opening a pipe would block before its type can be checked.
    return os.open(path, how | flags("O_NONBLOCK"))


def _check_size(file: str, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise UnreadableImage(
            file,
            f"has {width}x{height} pixels",
            f", more than the {MOST_PIXELS / 1e6:.0f} million that are decoded; scale it down or "
            "remove it.",
        )


def _early_size(start: bytes) -> tuple[int, int]:
    """Width and height from the first 30 bytes of a PNG or WebP file; (0, 0) for others."""
    if start[:8] == b"\x89PNG\r\n\x1a\n":
        return int.from_bytes(start[16:20], "big"), int.from_bytes(start[20:24], "big")
    if len(start) < 30 or start[:4] != b"RIFF" or start[8:12] != b"WEBP":
        return 0, 0
    kind = start[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(start[24:27], "little"), 1 + int.from_bytes(start[27:], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(start[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    sides = int.from_bytes(start[26:28], "little"), int.from_bytes(start[28:], "little")
    return sides[0] & 0x3FFF, sides[1] & 0x3FFF


def _check_mode(file: str, mode: str) -> None:
    if mode not in _GREY and mode not in _COLOUR:
        raise UnreadableImage(
            file,
            f"has pixel format {mode!r}",
            "; convert it to an 8-bit grey or RGB image.",
        )
