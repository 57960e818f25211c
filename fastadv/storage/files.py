"""Files of a run folder that may come from another user: writing follows no link, and only regular
files of a sensible size are read."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fastadv.errors import UserError
from fastadv.storage.printable import printable

_NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A new file that replaces ``path`` when the block ends without an exception.

    It is created exclusively beside ``path``. A symbolic link of either name is replaced or
    removed, and its target stays unchanged. Raises ``OSError`` as ``open`` does.
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def appended(path: Path) -> Iterator[BinaryIO]:
    """``path`` open for appending, created if missing, never through a link.

    Raises ``UserError`` when it is a link or no regular file.
    """
    handle = _open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_LINK)
    with open(handle, "ab") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def regular(path: Path) -> Iterator[BinaryIO]:
    """``path`` open for reading. A pipe, a device or a folder is refused without waiting.

    Raises ``UserError`` for these, and ``FileNotFoundError`` when there is none.
    """
    handle = _open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        yield file


def make_folder(path: Path) -> None:
    """A folder at ``path``, made if there is none. Raises ``UserError`` if something else is there,
    also a link to a folder, and ``OSError``."""
    with suppress(FileExistsError):
        path.mkdir()
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise UserError(f"{printable(path)} is no folder; fastadv does not write there.")


def read(path: Path, most: int) -> bytes:
    """The bytes of ``path``; ``UserError`` when it has more than ``most`` or is not regular."""
    with regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{printable(path)} is larger than such a file may be ({most:,} bytes).")
    return content


def _open(path: Path, flags: int) -> int:
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise UserError(_irregular(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(_irregular(path))
    return handle


def _irregular(path: Path) -> str:
    return (
        f"{printable(path)} is not a regular file (a link, a pipe, a device or a folder); fastadv "
        "does not use it."
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
