"""Evaluations that have not ended: the verdicts so far, image by image.

A file of ``evaluations.partial/`` belongs to one pass over the images and one process: a line of
JSON, then the ledgers. It is used only for the same settings (among them the digests of weights
and images), and if it carries this user's mark. Others are ignored. A file that a
training run has stored has ".run." in its name; once the run has its summary, the file is removed.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastadv.engine.process import distributed
from fastadv.errors import UserError
from fastadv.evaluation.found import Found
from fastadv.evaluation.ledger import Ledger
from fastadv.storage import files, trust
from fastadv.storage.digests import digest

Settings = dict[str, Any]

_MOST_BYTES = 1 << 28
_MOST_FILES = 64


@dataclass(frozen=True)
class Kept:
    """What was ``found`` before, in so many ``seconds``."""

    found: Found
    seconds: float


class Unfinished:
    """The files of one run folder. Each process writes its own and reads those of all. ``of_run``:
    the training run itself writes."""

    def __init__(self, folder: Path, *, of_run: bool = False) -> None:
        self._folder = folder
        self._writer = ".run" if of_run else ""

    @property
    def empty(self) -> bool:
        """True if there is no file."""
        return not self._folder.exists()

    def keep(self, settings: Settings, found: Found, seconds: float, total: int) -> None:
        """Store what this process has ``found``, in place of what it had stored. Raises ``OSError``
        and ``UserError``."""
        path = self._folder / f"{_key(settings)}{self._writer}.{distributed.rank()}"
        files.make_folder(self._folder)
        if not path.exists():
            self._make_room()
        parts = {name: ledger.packed() for name, ledger in found.ledgers.items()}
        bounds = {name: ledger.bounds(total) for name, ledger in found.ledgers.items()}
        header = {
            "settings": settings,
            "known": {name: int(each.known.sum()) for name, each in found.ledgers.items()},
            "of": total,
            "accuracy between": {name: list(ends) for name, ends in bounds.items()},
            "seconds": round(seconds, 3),
            "stages": dict(found.stages),
            "masks": found.masks,
            "images": found.images,
            "bytes": {name: len(part) for name, part in parts.items()},
        }
        payload = b"".join(parts.values())
        line = json.dumps(header)
        mark = trust.sign(line.encode() + payload)
        with files.replaced(path) as file:
            file.write(json.dumps({"mark": mark}).encode() + b"\n" + line.encode() + b"\n")
            file.write(payload)

    def find(self, settings: Settings) -> Kept | None:
        """What all processes have stored of the pass with ``settings``, or None."""
        plain = json.loads(json.dumps(settings))  # as a file holds them
        parts = [each for path in self._files(settings) if (each := _read(path, plain)) is not None]
        if not parts:
            return None
        first = parts[0].found
        ledgers = {
            name: Ledger.union(part.found.ledgers[name] for part in parts) for name in first.ledgers
        }
        images = max(part.found.images for part in parts)
        masks = next((part.found.masks for part in parts if part.found.masks), [])
        return Kept(
            Found(ledgers, first.stages, images, masks), max(part.seconds for part in parts)
        )

    def drop(self, settings: Settings) -> None:
        """Delete what is stored of the pass with ``settings``, by process 0."""
        if distributed.rank() != 0:
            return
        with suppress(OSError):
            for path in self._files(settings):
                path.unlink(missing_ok=True)
            self._folder.rmdir()  # if it is empty

    def of_the_run(self) -> list[Path]:
        """The files that the training run has stored."""
        return sorted(self._folder.glob("*.run.*[0-9]"))

    def _files(self, settings: Settings) -> list[Path]:
        return sorted(self._folder.glob(f"{_key(settings)}.*[0-9]"), key=lambda path: path.suffix)

    def _make_room(self) -> None:
        """Delete the oldest files if there are too many."""
        paths = sorted(self._folder.iterdir(), key=lambda path: os.lstat(path).st_mtime)
        for path in paths[: max(0, len(paths) - _MOST_FILES + 1)]:
            path.unlink(missing_ok=True)


def _key(settings: Settings) -> str:
    return digest(json.dumps(settings))[:16]


def _read(path: Path, settings: Settings) -> Kept | None:
    """What is in ``path``; None if it is damaged, of another pass or another user."""
    try:
        content = files.read(path, _MOST_BYTES)
        first, line, payload = content.split(b"\n", 2)
        mark = trust.sign(line + payload)
        if not mark or not hmac.compare_digest(mark, json.loads(first)["mark"]):
            return None
        header: Mapping[str, Any] = json.loads(line)
        if header["settings"] != settings:
            return None
        ledgers, start = {}, 0
        for name, length in header["bytes"].items():
            ledgers[name] = Ledger.unpacked(payload[start : start + length])
            start += length
    except (OSError, UserError, ValueError, KeyError, TypeError, RecursionError):
        return None
    found = Found(ledgers, header["stages"], header["images"], header["masks"])
    return Kept(found, header["seconds"])
