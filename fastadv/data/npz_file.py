"""Arrays of an ``.npz`` file, their sizes checked against the file before memory is allocated.

``numpy.load`` trusts an array's header: a few bytes can request any amount of memory. Here a
member must be a plain array (no pickle) whose header, directory entry and content agree, and it is
read in blocks of rows, so that converting it needs no second copy.
"""

from __future__ import annotations

import io
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastadv.storage.files import flags

_BLOCK = 2**24  # bytes read at a time
_DIRECTORY = 2**20  # bytes; four arrays take 300
# Photographs compress 10-fold, drawings 50-fold; more is a decompression bomb.
_LARGE, _MOST_DEFLATED = 2**28, 200
_NUMBERS = "biuf"
_MOST_DIMENSIONS = 8


class NotPlain(ValueError):
    """The file is not an .npz file of plain arrays; the message is the reason."""


@dataclass(frozen=True)
class Member:
    """One array that has not been read: its ``shape`` and ``dtype``, and ``blocks`` of its rows."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    archive: zipfile.ZipFile
    entry: zipfile.ZipInfo
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self) -> Iterator[np.ndarray]:
        """Consecutive blocks of rows, (n, *shape[1:]) each."""
        with self.archive.open(self.entry) as content:
            _exactly(content, self.start)
            if self.fortran:  # a row is spread over the whole file
                whole = _array(content, self.shape[::-1], self.dtype).T
                rows = self._rows_per_block()
                yield from (whole[n : n + rows] for n in range(0, len(whole), rows))
            else:
                left, rows = self.shape[0], self._rows_per_block()
                while left:
                    now = min(rows, left)
                    yield _array(content, (now, *self.shape[1:]), self.dtype)
                    left -= now
            if content.read(1):  # reading to the end also verifies the checksum
                raise NotPlain(f"{self.name} is longer than its header states")

    def whole(self) -> np.ndarray:
        """The whole array; for small arrays."""
        found = [np.asarray(block) for block in self.blocks()]
        return np.concatenate(found) if found else np.empty(self.shape, self.dtype)

    def _rows_per_block(self) -> int:
        each = math.prod(self.shape[1:]) * self.dtype.itemsize
        return max(1, _BLOCK // max(each, 1))


@contextmanager
def open_npz(
    path: Path, names: Iterable[str], kinds: str = _NUMBERS
) -> Iterator[dict[str, Member]]:
    """The arrays ``names`` found in the file ``path``; they can be read inside the block.

    ``kinds`` are numpy's letters of the allowed types: numbers, with "U" also texts.
    Raises ``NotPlain`` if it is not an .npz file of plain arrays (also while reading), and
    ``OSError``.
    """
    try:
        with _Modest(path) as file, zipfile.ZipFile(file) as archive:
            file.largest = None
            held = archive.infolist()
            yield {
                name: _member(name, archive, found, kinds)
                for name in names
                if (found := [entry for entry in held if entry.filename == f"{name}.npy"])
            }
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise NotPlain(str(error)) from error


class _Modest(io.FileIO):
    """A regular file that refuses a read of more than ``largest`` bytes (None: no limit)."""

    def __init__(self, path: Path) -> None:
        plain = flags("O_NONBLOCK")
        super().__init__(os.fspath(path), opener=lambda p, f: os.open(p, f | plain))
        self.largest: int | None = _DIRECTORY
        if not stat.S_ISREG(os.fstat(self.fileno()).st_mode):
            self.close()
            raise NotPlain("it is not a regular file")

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = -1 if size is None else size
        if wanted < 0:
            wanted = max(0, os.fstat(self.fileno()).st_size - self.tell())
        if self.largest is not None and wanted > self.largest:
            raise NotPlain("its directory is too long")
        return super().read(wanted) or b""


def _member(
    name: str, archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], kinds: str
) -> Member:
    if len(entries) > 1:
        raise NotPlain(f"it holds {len(entries)} arrays called {name}")
    entry = entries[0]
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise NotPlain(f"{name} uses a compression that numpy does not write")
    with archive.open(entry) as content:
        magic = _exactly(content, 10)
        if magic[:8] != b"\x93NUMPY\x01\x00":
            raise NotPlain(f"{name} is not a plain array")
        length = int.from_bytes(magic[8:], "little")
        text = io.BytesIO(magic[8:] + _exactly(content, length))
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(text)
    except Exception as error:  # the header is parsed as Python and may raise anything
        raise NotPlain(f"the header of {name} cannot be read") from error
    if dtype.kind not in kinds or dtype.subdtype is not None:
        raise NotPlain(f"{name} holds {dtype.kind!r} where numbers are needed")
    if not 1 <= len(shape) <= _MOST_DIMENSIONS or any(side < 0 for side in shape):
        raise NotPlain(f"{name} has the shape {shape}")
    found = Member(name, shape, dtype, bool(fortran), archive, entry, 10 + length)
    if found.start + found.nbytes != entry.file_size:
        raise NotPlain(
            f"the header of {name} says {found.nbytes} bytes, and the file holds "
            f"{entry.file_size - found.start}"
        )
    if entry.file_size > max(_LARGE, _MOST_DEFLATED * entry.compress_size):
        raise NotPlain(
            f"{name} would grow {entry.file_size // max(entry.compress_size, 1)}-fold to "
            f"{entry.file_size / 1e6:.0f} MB; numpy.savez stores images as they are"
        )
    return found


def _exactly(content: IO[bytes], count: int) -> bytes:
    found = content.read(count)
    if len(found) != count:
        raise NotPlain("it ends too early")
    return found


def _array(content: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    array: np.ndarray = np.empty(shape, dtype)
    source: Any = content  # a ZipExtFile: typeshed's IO has no readinto
    if array.size:
        view, done = array.reshape(-1).view(np.uint8).data, 0
        while done < len(view):
            got = source.readinto(view[done : done + _BLOCK])
            if not got:
                raise NotPlain("it ends too early")
            done += got
    return array
