"""Stored evaluations, so that none is repeated: one record per pass over the images.

A record holds the settings of the pass and its counts so far. It is used only if every setting is
the same (among them the digests of weights and images) and if it carries this user's mark. Damaged
records, those of other weights and those of other users are ignored.
"""

from __future__ import annotations

import hmac
import json
from typing import Any

from fastadv.engine.process import distributed
from fastadv.errors import UserError, warn
from fastadv.run.run_folder import RunFolder
from fastadv.storage import checkpoint, files, trust
from fastadv.storage.printable import printable

_MOST_BYTES = 8 << 20
_MOST_UNFINISHED = 64
_MARK = "mark"

Settings = dict[str, Any]
Record = dict[str, Any]


class EvalRecords:
    """The records of one run folder. Only rank 0 writes."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._said = False

    @property
    def empty(self) -> bool:
        """True if there is no record."""
        folder = self._folder
        return not folder.evaluations.exists() and not folder.unfinished.exists()

    def find(self, settings: Settings) -> Record | None:
        """The record of the furthest pass with ``settings``, the newest of equals, or None."""
        same = _of([*self._results(), *self._unfinished()], settings)
        return max(reversed(same), key=lambda record: record["images"], default=None)

    def holds_result(self, settings: Settings) -> bool:
        """True if evaluations.jsonl has a pass with ``settings``."""
        return bool(_of(self._results(), settings))

    def add(self, record: Record) -> None:
        """Append the result of a finished pass to evaluations.jsonl."""
        if distributed.rank() != 0:
            return
        path = self._folder.evaluations
        try:
            cut_short = path.exists() and not files.read(path, _MOST_BYTES).endswith(b"\n")
            with files.appended(path) as file:
                file.write(("\n" * cut_short + _sealed(record) + "\n").encode())
        except (OSError, UserError) as error:
            self._warn(error)

    def keep(self, record: Record, settings: Settings) -> None:
        """Store an unfinished pass in place of its earlier record."""
        self._rewrite(settings, [record])

    def drop(self, settings: Settings) -> None:
        """Delete the record of an unfinished pass."""
        if self._folder.unfinished.exists():
            self._rewrite(settings, [])

    def _rewrite(self, settings: Settings, more: list[Record]) -> None:
        if distributed.rank() != 0:
            return
        path = self._folder.unfinished
        settings = json.loads(json.dumps(settings))
        others = [
            record
            for record in self._unfinished()
            if any(record.get(name) != value for name, value in settings.items())
        ]
        kept = [*others, *more][-_MOST_UNFINISHED:]
        try:
            if kept:
                lines = ",\n".join(_sealed(record) for record in kept)
                checkpoint.write_text(path, f"[\n{lines}\n]\n")
            else:
                path.unlink(missing_ok=True)
        except (OSError, UserError) as error:
            self._warn(error)

    def _results(self) -> list[Record]:
        return _believed(self._text(self._folder.evaluations).split("\n"))

    def _unfinished(self) -> list[Record]:
        lines = self._text(self._folder.unfinished).split("\n")
        return _believed([line.removesuffix(",") for line in lines])

    def _text(self, path: Any) -> str:
        try:
            return files.read(path, _MOST_BYTES).decode("utf-8", "replace")
        except (OSError, UserError):
            return ""

    def _warn(self, error: Exception) -> None:
        if not self._said:
            self._said = True
            why = error.strerror if isinstance(error, OSError) else error
            warn(
                f"Evaluations cannot be stored in {printable(self._folder.path)} ({why}); one that "
                "is interrupted starts again from the first image."
            )


def _of(records: list[Record], settings: Settings) -> list[Record]:
    """The records of passes with ``settings``."""
    settings = json.loads(json.dumps(settings))  # as a record holds them
    return [r for r in records if all(r.get(name) == v for name, v in settings.items())]


def _sealed(record: Record) -> str:
    mark = trust.sign(json.dumps(record).encode())
    return json.dumps(record | {_MARK: mark})


def _believed(lines: list[str]) -> list[Record]:
    """The records among ``lines`` that this user wrote and that are unchanged."""
    found = []
    for line in lines:
        try:
            record = json.loads(line)
            mark = record.pop(_MARK)
            own = trust.sign(json.dumps(record).encode())
            whole = bool(own) and hmac.compare_digest(own, mark)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if whole:
            found.append(record)
    return found
