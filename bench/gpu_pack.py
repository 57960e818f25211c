"""Packs all results so far into one file, repeatedly, so that an interrupted call leaves its
results."""

import contextlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

# Weights, images, and files that are still being written.
NOT_PACKED = {".pt", ".npz", ".partial", ".new", ".part"}
DRY = "dry-run"  # a file whose presence means that no row is a measurement
LARGEST = 2**20  # bytes of a log; a longer one is cut so that the packed file stays small


class Packing:
    """Context that packs ``folder`` into ``target`` every ``seconds``, and at the end.

    ``target`` is complete at any time: a temporary file is written and renamed."""

    def __init__(self, folder: Path, target: Path, seconds: float) -> None:
        self.folder, self.target, self.seconds = folder, target, seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Packing":
        pack(self.folder, self.target)  # fails at once if the target cannot be written
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        pack(self.folder, self.target)

    def _work(self) -> None:
        while not self._done.wait(self.seconds):
            with contextlib.suppress(OSError):  # tried again after ``seconds``
                pack(self.folder, self.target)


def pack(folder: Path, target: Path) -> None:
    """Write all results in ``folder`` to ``target`` (.tar.gz)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    with tarfile.open(partial, "w:gz", compresslevel=3) as archive:
        for file in sorted(folder.rglob("*")):
            if file.suffix not in NOT_PACKED and file.is_file():
                with contextlib.suppress(FileNotFoundError):  # deleted after it was listed
                    _add(archive, file, file.relative_to(folder))
    os.replace(partial, target)


def _add(archive: tarfile.TarFile, file: Path, name: Path) -> None:
    """Add the file's present content (a stage may still write it); of a long log only the end."""
    data = file.read_bytes()
    if file.suffix == ".log":
        data = data[-LARGEST:]
    entry = tarfile.TarInfo(str(name))
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """Extract all members into ``folder``.

    From Python 3.11.4 on, a member that would be written outside of it is an error. Earlier
    versions do not check this, so the archive must be one that these scripts have made.
    """
    archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
    archive.extractall(folder)


def rows_in(folder: Path) -> Iterator[dict]:
    """Every complete row of the result files in ``folder``."""
    for file in sorted(folder.glob("*.jsonl")):
        yield from whole_rows(file.read_text().splitlines())


def whole_rows(lines: Iterable[str]) -> Iterator[dict]:
    """The rows of ``lines``; a line that was cut off when its stage was killed is skipped."""
    for line in lines:
        with contextlib.suppress(ValueError):
            yield json.loads(line)
