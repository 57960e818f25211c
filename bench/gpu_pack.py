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

# Weights and images, and what is being written under another name.
NOT_PACKED = {".pt", ".npz", ".partial", ".new", ".part"}
DRY = "dry-run"  # a file that says: no row here is a measurement
LARGEST = 2**20  # bytes of a log; one that grew without end must not push out the rows


class Packing:
    """Inside the block ``folder`` is packed into ``target`` every ``seconds``, and once at the end.
    ``target`` is complete at any time: a temporary file is written and renamed."""

    def __init__(self, folder: Path, target: Path, seconds: float) -> None:
        self.folder, self.target, self.seconds = folder, target, seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Packing":
        pack(self.folder, self.target)  # a place that cannot be written to ends the call at once
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
            with contextlib.suppress(OSError):  # the next time may go well
                pack(self.folder, self.target)


def pack(folder: Path, target: Path) -> None:
    """Every result of ``folder`` in ``target`` (.tar.gz)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    with tarfile.open(partial, "w:gz", compresslevel=3) as archive:
        for file in sorted(folder.rglob("*")):
            if file.suffix not in NOT_PACKED and file.is_file():
                with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                    _add(archive, file, file.relative_to(folder))
    os.replace(partial, target)


def _add(archive: tarfile.TarFile, file: Path, name: Path) -> None:
    """The file as it is now (others go on writing); of a long log the end."""
    data = file.read_bytes()
    if file.suffix == ".log":
        data = data[-LARGEST:]
    entry = tarfile.TarInfo(str(name))
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """All members into ``folder``. From Python 3.11.4 on, a member that would be written outside of
    it is an error; before, the archive must be one of ours."""
    archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
    archive.extractall(folder)


def rows_in(folder: Path) -> Iterator[dict]:
    """Every complete row of the result files in ``folder``."""
    for file in sorted(folder.glob("*.jsonl")):
        yield from whole_rows(file.read_text().splitlines())


def whole_rows(lines: Iterable[str]) -> Iterator[dict]:
    """The rows of ``lines``, without one that was being written when its stage was killed."""
    for line in lines:
        with contextlib.suppress(ValueError):
            yield json.loads(line)
