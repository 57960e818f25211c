"""What is kept about a folder of images between runs: small arrays and packed pixels.

A name is a hash over the files (name, size, time of change) and what was asked of them, so that a
changed folder never finds an old entry. An entry is read only where its digest is the one this user
wrote (``array_file.py``).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastadv.data.array_file import read_back, user_cache, write_rows
from fastadv.data.decode import unreadable
from fastadv.data.folders import ImageTree
from fastadv.engine.process import stop
from fastadv.errors import UserError
from fastadv.storage.printable import printable

_VERSION = 2  # increase it when the same files would be decoded to other bytes
_FOLDER = ".fastadv-cache"


class TreeCache:
    """The entries about ``tree``, in ``folder``; by default in ``.fastadv-cache`` inside the tree,
    or in the user's cache folder if the tree is not writable.

    ``stamps``: one for each file, training files first. Raises ``UserError`` for a file that is
    missing or not a regular one.
    """

    def __init__(self, tree: ImageTree, folder: Path | None = None) -> None:
        self.folder = folder or _folder(tree.root)
        self.stamps = [_stamp(tree.root, file) for file in tree.train_files + tree.test_files]

    def path(self, stamps: list[str], *asked: object) -> Path:
        """The file of the entry about the files with ``stamps`` and what was ``asked``."""
        digest = hashlib.sha256(repr((_VERSION, *asked)).encode())
        for stamp in stamps:
            digest.update(stamp.encode("utf-8", "surrogateescape"))
        return self.folder / f"{digest.hexdigest()[:32]}.npy"

    def read(self, path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray | None:
        """The entry in ``path``, or None."""
        return read_back(path, shape, dtype)

    def write(
        self, path: Path, rows: Iterator[np.ndarray], shape: tuple[int, ...], dtype: type
    ) -> np.ndarray:
        """Write ``rows`` as the entry in ``path``, and return what it holds."""
        try:
            written = write_rows(path, rows, shape, dtype)
        except OSError as error:
            why = "no space is left" if error.errno == errno.ENOSPC else str(error)
            raise UserError(
                f"The image cache cannot be written to {printable(path.parent)}: {printable(why)}; "
                "make room or choose another folder with --data-root."
            ) from error
        if written is None:
            raise UserError(
                f"The image cache {printable(path)} cannot be read back; check that disk."
            )
        stop.note_progress()
        return written


def _stamp(root: Path, file: str) -> str:
    try:
        found = os.stat(file)
    except OSError as error:
        raise unreadable(file) from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{printable(file)} is not a regular file; remove it.")
    return f"{os.path.relpath(file, root)}\0{found.st_size}\0{found.st_mtime_ns}\n"


def _folder(root: Path) -> Path:
    inside = root / _FOLDER
    # A link would redirect the writes to a place outside of the tree.
    if os.access(root, os.W_OK) and not inside.is_symlink():
        return inside
    return user_cache()
