"""Finds the image files below a folder, and counts the files that are ignored."""

from __future__ import annotations

import functools
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fastadv.engine.torchvision_shim import import_torchvision
from fastadv.errors import UserError
from fastadv.storage.printable import printable


@dataclass
class LeftOut:
    """Counts of the files in an image tree that are not read, reported in one line."""

    suffixes: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)

    def sentence(self) -> str:
        """All counts in one line; "" if nothing was ignored."""
        parts = []
        if self.suffixes:
            shown = ", ".join(printable(suffix or "none") for suffix in sorted(self.suffixes)[:5])
            more = ", ..." if len(self.suffixes) > 5 else ""
            parts.append(f"{self.suffixes.total()} of another suffix ({shown}{more})")
        parts += [f"{count} {what}" for what, count in self.others.items()]
        return ", ".join(parts)


@functools.cache
def image_suffixes() -> tuple[str, ...]:
    """The suffixes of image files, torchvision's: .jpg, .png, .bmp, .webp, ..."""
    import_torchvision()
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return tuple(IMG_EXTENSIONS)


def image_files(folder: Path, left_out: LeftOut) -> list[str]:
    """Every image in ``folder`` and the folders below it, sorted by path.

    Links are followed, and a folder that is reached twice is read once, so cycles of links end.
    Only regular files count as images: opening a pipe or a device could block.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    waiting = [os.fspath(folder)]
    while waiting:
        here = waiting.pop()
        mark = os.stat(here)
        if (mark.st_dev, mark.st_ino) in seen:
            left_out.others["folders reached twice by links"] += 1
            continue
        seen.add((mark.st_dev, mark.st_ino))
        folders = []
        for entry in entries(here):
            if entry.name.startswith("."):
                left_out.others["hidden"] += 1
            elif is_folder(entry):
                folders.append(entry.path)
            elif not entry.name.lower().endswith(image_suffixes()):
                left_out.suffixes[os.path.splitext(entry.name)[1].lower()] += 1
            elif not _is_regular(entry):
                left_out.others["that are not regular files"] += 1
            else:
                found.append(entry.path)
        waiting += reversed(folders)
    return sorted(found)


def entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """The entries of ``folder``, sorted by name."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"The folder {printable(folder)} cannot be read: {error.strerror}."
        ) from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """True if ``entry`` is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_regular(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False
