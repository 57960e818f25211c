"""One image file to one array, and what a set of files has in common."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from os import cpu_count
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastadv.errors import UserError

_GREY = ("1", "L", "LA")
_COLOUR = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_UNREADABLE = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
)

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


def decode(file: str, form: Format) -> np.ndarray:
    """The image ``file`` as uint8 (C,H,W).

    An image of another size is scaled until it covers ``form`` and cut around its centre. Raises
    ``UserError`` naming the file when it cannot be read.
    """
    try:
        with Image.open(file) as source:
            _check_mode(file, source.mode)
            image: Image.Image = source.convert("L" if form.channels == 1 else "RGB")
    except UserError:
        raise
    except _UNREADABLE as error:
        raise unreadable(file) from error
    if image.size != (form.width, form.height):
        image = ImageOps.fit(image, (form.width, form.height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if form.channels == 1 else pixels.transpose(2, 0, 1)


def common_format(files: list[str], image_size: int | None = None) -> tuple[Format, int]:
    """The most common size of ``files`` (or ``image_size`` squared) and how many differ from it.

    Images are grey only if every one is. Only headers are read.
    """
    sizes: Counter[tuple[int, int]] = Counter()
    grey = True
    for width, height, is_grey in in_threads(_header, files):
        sizes[height, width] += 1
        grey = grey and is_grey
    height, width = (image_size, image_size) if image_size else sizes.most_common(1)[0][0]
    return Format(height, width, 1 if grey else 3), len(files) - sizes[height, width]


def in_threads(work: Callable[[Item], Result], items: list[Item]) -> Iterator[Result]:
    """``map(work, items)`` on a pool of threads, in order, a bounded stretch ahead of the reader.

    Pillow gives the interpreter's lock back while it decodes. Items are handed out in chunks:
    one future an item costs more than decoding a small image.
    """
    chunks = iter([items[n : n + _CHUNK] for n in range(0, len(items), _CHUNK)])
    threads = min(cpu_count() or 1, 8)  # more only fight for the lock
    with ThreadPoolExecutor(threads) as pool:
        ahead = deque(pool.submit(_map, work, chunk) for chunk in islice(chunks, 2 * threads))
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
        return UserError(f"The image {file} is missing.")
    return UserError(f"{file} is not a readable JPEG or PNG image; mend or remove it.")


def _check_mode(file: str, mode: str) -> bool:
    if mode not in _GREY and mode not in _COLOUR:
        raise UserError(
            f"{file} has pixels of kind {mode!r}; convert it to an 8-bit grey or RGB image."
        )
    return mode in _GREY


def _header(file: str) -> tuple[int, int, bool]:
    try:
        with Image.open(file) as source:
            return *source.size, _check_mode(file, source.mode)
    except UserError:
        raise
    except _UNREADABLE as error:
        raise unreadable(file) from error
