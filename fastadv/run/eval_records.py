"""The results of evaluations, so that none is repeated: a line for each.

A line holds the settings of an evaluation and its result. It is used only if every setting is the
same (among them the digests of weights and images) and if it carries this user's mark. Damaged
lines, those of other weights and those of other users are ignored.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

from fastadv.engine.process import distributed
from fastadv.errors import UserError, warn
from fastadv.evaluation.verdicts import Verdicts
from fastadv.run.run_folder import RunFolder
from fastadv.run.unfinished import Settings
from fastadv.storage import files, trust
from fastadv.storage.digests import digest
from fastadv.storage.printable import printable

_MOST_BYTES = 8 << 20
_MOST_OF_VERDICTS = 1 << 30
_MARK = "mark"

Record = dict[str, Any]


class EvalRecords:
    """The results in one run folder. Only rank 0 writes."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._said = False

    @property
    def empty(self) -> bool:
        """True if there is none."""
        return not self.folder.evaluations.exists()

    def find(self, settings: Settings, *, examples: bool = False) -> tuple[Record, Verdicts] | None:
        """The newest result with ``settings`` and its verdicts, or None. ``examples``: one whose
        adversarial examples were saved."""
        plain = json.loads(json.dumps(settings))  # as a line holds them
        same = [
            record
            for record in self.results()
            if all(record.get(name) == value for name, value in plain.items())
        ]
        for record in reversed(same):
            if examples and not self._has_examples(record):
                continue
            verdicts = self._verdicts(record)
            if verdicts is not None:
                return record, verdicts
        return None

    def _has_examples(self, record: Record) -> bool:
        return "examples" in record and (self.folder.path / record["examples"]).is_file()

    def _verdicts(self, record: Record) -> Verdicts | None:
        """The verdicts of ``record``; None, with a warning, if their file is not what it was."""
        if "verdicts" not in record:
            return None
        path = self.folder.path / record["verdicts"]
        try:
            if _hash(path) == record["verdicts_sha256"]:
                return Verdicts.read(path)
            what = "was changed"
        except FileNotFoundError:
            what = "is missing"
        except (OSError, UserError):
            what = "cannot be read"
        warn(f"{printable(path)} {what}, so {record['attack']} is evaluated again.")
        return None

    def place_for(self, settings: Settings, which: str) -> Path:
        """Where the verdicts of a pass with ``settings`` on the weights ``which`` go."""
        words = f"{which.removesuffix(' weights')}-{settings['attack']}"
        plain = "".join(c if c.isascii() and (c.isalnum() or c in "-.+") else "_" for c in words)
        return self.folder.verdicts / f"{plain[:80]}-{digest(json.dumps(settings))[:8]}.npz"

    def add(self, record: Record, verdicts: Verdicts, place: Path) -> None:
        """Write ``verdicts`` to ``place``, and the result to evaluations.jsonl."""
        if distributed.rank() != 0:
            return
        try:
            files.make_folder(self.folder.verdicts)
            verdicts.write(place)
            record = record | {
                "verdicts": str(place.relative_to(self.folder.path)),
                "verdicts_sha256": _hash(place),
            }
            self._append(record)
        except (OSError, UserError) as error:
            self.warn(error)

    def note(self, record: Record) -> None:
        """Write a line without verdicts to evaluations.jsonl, which no evaluation takes for its
        own."""
        if distributed.rank() != 0:
            return
        try:
            self._append(record)
        except (OSError, UserError) as error:
            self.warn(error)

    def _append(self, record: Record) -> None:
        path = self.folder.evaluations
        cut_short = path.exists() and not files.read(path, _MOST_BYTES).endswith(b"\n")
        with files.appended(path) as file:
            file.write(("\n" * cut_short + _sealed(record) + "\n").encode())

    def results(self) -> list[Record]:
        """All results that this user wrote, the oldest first."""
        return _believed(self._text(self.folder.evaluations).split("\n"))

    def _text(self, path: Any) -> str:
        try:
            return files.read(path, _MOST_BYTES).decode("utf-8", "replace")
        except (OSError, UserError):
            return ""

    def warn(self, error: Exception) -> None:
        """Say once that results cannot be stored."""
        if not self._said:
            self._said = True
            why = error.strerror if isinstance(error, OSError) else error
            warn(
                f"Evaluations cannot be stored in {printable(self.folder.path)} ({why}); one that "
                "is interrupted starts again from the first image."
            )


def _hash(path: Path) -> str:
    return hashlib.sha256(files.read(path, _MOST_OF_VERDICTS)).hexdigest()


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
