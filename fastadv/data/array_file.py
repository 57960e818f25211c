"""Arrays in files that are believed only where this user wrote them.

The cache of a folder lies inside it, and a folder may come from a stranger, with a cache that shows
other pixels than its images. So the digest of what is written is kept in the user's own cache
folder; a file without its digest there, or with another, is not read. Damage is found that way too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np


def write_rows(
    path: Path, rows: Iterator[np.ndarray], shape: tuple[int, ...], dtype: type
) -> np.ndarray | None:
    """Write ``rows`` one after another into the ``.npy`` file ``path``, and read them back.

    Aside, synced, renamed. Plain writes, not a memory map: on a full disk a map ends the process
    with a signal. Raises ``OSError``; None where what was written cannot be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with replacing(path) as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for row in rows:
            content = row.tobytes()
            digest.update(content)
            file.write(content)
    note = _note(path)
    # Without a note the rows are made again another time.
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        with replacing(note) as file:
            file.write(digest.hexdigest().encode())
    return _read(path, shape, dtype, digest.hexdigest())


def read_back(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray | None:
    """The array in ``path``; None when it is not there, not whole, or not what was written."""
    try:
        noted = _note(path).read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return _read(path, shape, dtype, noted)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` once it is whole and on the disk.

    It is made beside it under a name that nobody can guess or has used, and a link in the place of
    ``path`` is replaced, never followed.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with open(os.open(aside, flags, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def user_cache() -> Path:
    """The user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastadv"


def _note(path: Path) -> Path:
    place = os.fsencode(os.path.realpath(path))
    return user_cache() / "digests" / hashlib.sha256(place).hexdigest()


def _read(path: Path, shape: tuple[int, ...], dtype: type, digest: str) -> np.ndarray | None:
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        with open(os.open(path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            if np.lib.format.read_magic(file) != (1, 0):
                return None
            found = np.lib.format.read_array_header_1_0(file)
            array: np.ndarray = np.empty(shape, dtype)
            whole = file.tell() + array.nbytes == os.fstat(file.fileno()).st_size
            if found != (shape, False, array.dtype) or not whole:
                return None
            file.readinto(array.data.cast("B"))
    except (OSError, ValueError, EOFError):
        return None
    same = hashlib.sha256(array.data).hexdigest() == digest
    return array if same else None
