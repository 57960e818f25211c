"""One image file to one array, and what a set of files has in common."""

from __future__ import annotations

import os
import stat
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from os import cpu_count
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from fastadv.errors import UserError
from fastadv.storage.printable import printable

_GREY = ("1", "L", "LA")
_COLOUR = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")

# Those of torchvision's suffixes. A file is read as what it holds, whatever it is called, and
# Pillow would hand PostScript to a program.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")

# A header of a few bytes can ask for gigabytes. Photographs have fewer pixels than this.
MOST_PIXELS = 2**25
# No format needs more for so many pixels: four channels of a byte, and what surrounds them.
_MOST_BYTES = 4 * MOST_PIXELS + 2**20
# What images that are being decoded, or wait for their reader, may take together.
IN_FLIGHT = 2**28

_CHUNK = 32

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Format:
    """What images are decoded to: height, width and 1 (grey) or 3 (RGB) channels."""

    height: int
    width: int
    channels: int

    @property
    def bytes_each(self) -> int:
        """Bytes of one image of uint8."""
        return self.height * self.width * self.channels


@dataclass(frozen=True)
class Common:
    """The format that ``files`` images share, and how many of them differ from it in size.

    ``coloured``: how many are not grey.
    """

    form: Format
    odd: int
    coloured: int


class _Room:
    """So many bytes that threads share; one alone may take more."""

    def __init__(self, size: int) -> None:
        self._free, self._size = size, size
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, wanted: int) -> Iterator[None]:
        """Wait until ``wanted`` bytes are free, and hold them meanwhile."""
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

    An image of another size is scaled until it covers ``form`` and cut around its centre. Raises
    ``UserError`` naming the file when it cannot be read.
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
    """What ``files`` are decoded to: ``image_size`` squared, or the size of most of them.

    Images are grey only if every one is. Only headers are read. Raises ``UserError`` where no size
    is that of more than half: nobody would expect any one of them.
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
            f"These {len(files)} images have {len(sizes)} sizes, none of them that of more than "
            f"half: say what to bring them to, such as --image-size {sides[len(sides) // 2]}."
        )
    form = Format(height, width, 3 if coloured else 1)
    return Common(form, len(files) - sizes[height, width], coloured)


def in_threads(
    work: Callable[[Item], Result], items: list[Item], bytes_each: int = 1
) -> Iterator[Result]:
    """``map(work, items)`` on a pool of threads, in order, a bounded stretch ahead of the reader.

    Pillow gives the interpreter's lock back while it decodes. Items are handed out in chunks:
    one future an item costs more than decoding a small image. Results of ``bytes_each`` that wait
    take no more than ``IN_FLIGHT``.
    """
    threads = min(cpu_count() or 1, 8)  # more only fight for the lock
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


def first_unreadable(files: Iterable[str]) -> UserError | None:
    """The error for the first of ``files`` that does not decode, if there is one."""
    for file in files:
        try:
            decode(file, Format(1, 1, 3))
        except UserError as error:
            return error
    return None


def unreadable(file: str) -> UserError:
    """The error for an image file that cannot be decoded."""
    if not Path(file).is_file():
        return UserError(f"The image {printable(file)} is missing.")
    return UserError(
        f"{printable(file)} is not a readable JPEG or PNG image (nor another that fastadv reads); "
        "mend or remove it."
    )


def header(file: str) -> tuple[int, int, bool]:
    """Height and width of an image, and whether it is grey; nothing is decoded."""
    with _opened(file) as source:
        return source.height, source.width, source.mode in _GREY


@contextmanager
def _opened(file: str) -> Iterator[Image.Image]:
    """The image in ``file``, its header read and its size found bearable; errors name it."""
    try:
        with open(file, "rb", opener=_without_waiting) as raw:
            found = os.fstat(raw.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"{printable(file)} is no regular file; remove it.")
            if found.st_size > _MOST_BYTES:
                raise UserError(
                    f"{printable(file)} takes {found.st_size / 1e6:.0f} MB, more than an image of "
                    f"{MOST_PIXELS / 1e6:.0f} million pixels can; scale it down."
                )
            # Pillow's reader of WebP takes memory for the pixels as it opens one.
            _check_size(file, *_early_size(raw.read(30)))
            raw.seek(0)
            with Image.open(raw, formats=_FORMATS) as source:
                _check_size(file, *source.size)
                _check_mode(file, source.mode)
                yield source
    except (UserError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{printable(file)} has more than the {MOST_PIXELS / 1e6:.0f} million pixels that are "
            "decoded; scale it down or remove it."
        ) from error
    except Exception as error:  # whatever a decoder makes of a damaged or hostile file
        raise unreadable(file) from error


def _without_waiting(path: str, flags: int) -> int:
    # A pipe would otherwise be waited for before it can be told from a file.
    return os.open(path, flags | os.O_NONBLOCK)


def _check_size(file: str, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise UserError(
            f"{printable(file)} has {width}x{height} pixels, more than the "
            f"{MOST_PIXELS / 1e6:.0f} million that are decoded; scale it down or remove it."
        )


def _early_size(start: bytes) -> tuple[int, int]:
    """Width and height that the first 30 bytes of a PNG or WebP file say; (0, 0) for others."""
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
        raise UserError(
            f"{printable(file)} has pixels of kind {mode!r}; convert it to an 8-bit grey or RGB "
            "image."
        )
