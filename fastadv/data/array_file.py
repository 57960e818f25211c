"""Array files that are trusted only if this user wrote them.

The cache of a folder is stored inside it, and a downloaded folder may contain a cache whose pixels
differ from its images. So the digest of each written file is kept in the user's own cache folder. A
file without a digest there, or with a different one, is not read. This also detects damage.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastadv.storage.files import flags

_instead: ContextVar[Path | None] = ContextVar("arrays are written here", default=None)


@contextlib.contextmanager
def writing_nothing() -> Iterator[None]:
    """Inside, arrays are written into a temporary folder that is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="fastadv-") as folder:
        before = _instead.set(Path(folder))
        try:
            yield
        finally:
            _instead.reset(before)


def write_rows(
    path: Path, rows: Iterator[np.ndarray], shape: tuple[int, ...], dtype: type
) -> np.ndarray | None:
    """Write ``rows`` one after another into the ``.npy`` file ``path``, and read them back.

    The file is written under a temporary name, synced and renamed. Plain writes, not a memory map:
    on a full disk a memory map kills the process with a signal. Raises ``OSError``. Returns None if
    the written file cannot be read back.
    """
    instead = _instead.get()
    path = path if instead is None else instead / path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with replacing(path) as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for row in rows:
            content = row.tobytes()
            digest.update(content)
            file.write(content)
    if instead is not None:
        return _read(path, shape, dtype, digest.hexdigest())
    digest_file = _digest_file(path)
    # Without its digest the file is only a cache miss next time.
    with contextlib.suppress(OSError):
        digest_file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(digest_file) as file:
            file.write(digest.hexdigest().encode())
    return _read(path, shape, dtype, digest.hexdigest())


def read_back(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray | None:
    """The array in ``path``; None if it is missing, incomplete or differs from what was written."""
    try:
        noted = _digest_file(path).read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return _read(path, shape, dtype, noted)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that replaces ``path`` once it is complete and synced to disk.

    It is created in the same folder under a random, unused name. A link at ``path`` is replaced,
    not followed.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    how = os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags("O_NOFOLLOW")
    try:
        with open(os.open(temporary, how, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def user_cache() -> Path:
    """The user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastadv"


def _digest_file(path: Path) -> Path:
    place = os.fsencode(os.path.realpath(path))
    return user_cache() / "digests" / hashlib.sha256(place).hexdigest()


def _read(path: Path, shape: tuple[int, ...], dtype: type, digest: str) -> np.ndarray | None:
    try:
        how = os.O_RDONLY | flags("O_NOFOLLOW", "O_NONBLOCK")
        with open(os.open(path, how), "rb") as file:
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
