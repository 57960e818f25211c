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


def flags(*names: str) -> int:
    """The flags of ``os.open`` called ``names``, such as ``"O_NOFOLLOW"``. Those that this system
    has not are left out; Windows, which has few of them, is asked not to change line ends."""
    found = getattr(os, "O_BINARY", 0)
    for name in names:
        found |= getattr(os, name, 0)
    return int(found)


_NO_LINK = flags("O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK")
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTSUP)


@contextmanager
def replaced(path: Path, keep_as: Path | None = None) -> Iterator[BinaryIO]:
    """A new file that replaces ``path`` when the block ends without an exception.

    It is created exclusively beside ``path``. A symbolic link of either name is replaced or
    removed, and its target stays unchanged. The file that was at ``path`` is called ``keep_as``
    from then on; at every moment one of the two names is a whole file. Raises ``OSError`` as
    ``open`` does.
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None:
            keep(path, keep_as)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):  # as in a folder that became read-only
            partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def keep(path: Path, name: Path) -> None:
    """Make ``name`` another name of the regular file ``path``, in place of what it was.

    On a file system without hard links ``path`` is renamed, and so gone. Without a regular file
    at ``path`` nothing happens.
    """
    if not _is_regular(path):
        return
    link = name.with_name(name.name + ".partial")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except (OSError, AttributeError):
        os.replace(path, name)
        return
    os.replace(link, name)
    link.unlink(missing_ok=True)  # it stays where both are names of one file already


def reason(error: OSError) -> str:
    """Why a file could not be read or written, in words."""
    return error.strerror or type(error).__name__


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


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
    handle = _open(path, os.O_RDONLY | flags("O_CLOEXEC", "O_NONBLOCK"))
    with open(handle, "rb") as file:
        yield file


def make_folder(path: Path) -> None:
    """A folder at ``path``, made if there is none. Raises ``UserError`` if something else is there,
    also a link to a folder, and ``OSError``."""
    with suppress(FileExistsError):
        path.mkdir()
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise UserError(f"{printable(path)} is no folder; fastadv does not write there.")


def require_plain(path: Path) -> None:
    """Raise ``UserError`` if ``path`` is there and no regular file: what is written would take the
    place of a link, a pipe or a device."""
    if os.path.lexists(path) and not _is_regular(path):
        raise UserError(_irregular(path))


def read(path: Path, most: int) -> bytes:
    """The bytes of ``path``; ``UserError`` when it has more than ``most`` or is not regular."""
    with regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{printable(path)} is larger than such a file may be ({most:,} bytes).")
    return content


def _open(path: Path, how: int) -> int:
    try:
        handle = os.open(path, how, 0o666)
    except OSError as error:
        # Windows calls a folder a matter of permissions.
        folder = isinstance(error, PermissionError) and path.is_dir()
        if folder or error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
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
    """Write the names in ``folder`` to the disk, where the system can (Windows cannot)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)
