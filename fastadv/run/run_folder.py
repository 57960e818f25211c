"""A run's folder: config.toml, metrics.jsonl, last.pt, best.pt, summary.json.

If a recipe averages weights, averaged.pt holds the last evaluated average, last.pt the live
weights. epochs/ holds the weights that were kept after epochs, as they are evaluated.
evaluations.jsonl holds the results of ``fastadv evaluate``, verdicts/ those on every
image, and evaluations.partial/ what an interrupted evaluation had found
(``fastadv.run.unfinished``).

Each file carries its own checksum. Only rank 0 writes; the other processes read. A folder may come
from anywhere: names in its files are not trusted (``read_config``), and writing follows no link in
it (``files``).
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fastadv.data import is_tree
from fastadv.data.array_file import user_cache
from fastadv.engine.process import distributed
from fastadv.errors import UserError
from fastadv.models.packaged import names_own_code
from fastadv.run.config import RunConfig
from fastadv.run.config_file import MOST_BYTES, from_bytes, to_toml
from fastadv.run.resolve import resolve_stored
from fastadv.storage import checkpoint, files, sealed, trust
from fastadv.storage.printable import printable

_MOST_RECORDED = 8 << 20  # bytes of metrics.jsonl and of summary.json


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.last = path / "last.pt"
        self.best = path / "best.pt"
        self.last_good = path / "last_good.pt"
        self.guarded = path / "guarded.pt"  # the state to which an overfitted run goes back
        self.averaged = path / "averaged.pt"
        self.epochs = path / "epochs"
        self.summary = path / "summary.json"
        self.evaluations = path / "evaluations.jsonl"
        self.verdicts = path / "verdicts"
        self.unfinished = path / "evaluations.partial"
        self.made = False  # the folder did not exist before this run

    def files(self) -> list[Path]:
        """The paths of the run's files, whether they exist or not."""
        return [
            place
            for name, place in vars(self).items()
            if isinstance(place, Path) and name != "path"
        ]

    def kept(self, epoch: int) -> Path:
        """Where the weights after ``epoch`` (from 1) are, if they were kept."""
        return self.epochs / f"{epoch:04d}.pt"

    @classmethod
    def create(cls, out: str | None, config: RunConfig) -> RunFolder:
        """A new folder with the resolved configuration. Raises ``UserError`` if it holds a run."""
        path = Path(out) if out else _free_name(config)
        folder = cls(path)
        folder.made = out is None or not path.exists()
        if folder.config.exists():
            raise UserError(
                f"{path} already holds a run; continue it with --resume {path} or choose another "
                "--out."
            )
        distributed.wait()  # all have looked before one writes
        if distributed.rank() == 0:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"Cannot make the folder {path}: {error.strerror}.") from None
            text = sealed.seal_text(to_toml(config))
            checkpoint.write_text(folder.config, text)
            trust.remember(path, text.encode())
        distributed.wait()
        return folder

    def forget_unbegun(self) -> None:
        """Remove the configuration of a run that was refused before its first update, so that a
        corrected one can take the folder. The folder is also removed if ``create`` made it."""
        begun = any(file.exists() for file in self.files() if file != self.config)
        if begun or distributed.rank() != 0:
            return
        self.config.unlink(missing_ok=True)
        if self.made:
            with suppress(OSError):  # something else is in it by now
                self.path.rmdir()

    @classmethod
    def open(cls, path: str) -> RunFolder:
        """The folder of an existing run."""
        folder = cls(Path(path))
        if not os.path.lexists(folder.config):
            raise UserError(_no_run(path))
        return folder

    def read_config(self) -> RunConfig:
        """The configuration of the run, complete and checked.

        If this user did not begin the run here, code that it names is refused, and nothing is
        written to a path that it names or downloaded.
        """
        try:
            content = files.read(self.config, MOST_BYTES)
        except OSError as error:
            raise UserError(f"Cannot read {printable(self.config)}: {error.strerror}.") from None
        config = resolve_stored(from_bytes(content, self.config))
        if names_own_code(config.model):
            trust.require(self.path, content, config.model)
        if trust.is_own(self.path, content):
            return config
        if is_tree(config.data):  # packed images would be written there
            config = dataclasses.replace(config, data_root=str(user_cache()))
        return dataclasses.replace(config, download=False)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Raises ``UserError`` if another process trains in this folder."""
        if distributed.rank() != 0:
            yield
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"Another process trains in {printable(self.path)}; wait for its end."
            ) from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            os.close(handle)

    def save(self, path: Path, payload: dict[str, Any]) -> None:
        """``checkpoint.save``; afterwards every process can read it."""
        if distributed.rank() == 0:
            checkpoint.save(path, payload)
        distributed.wait()

    def keep(self, epoch: int, payload: dict[str, Any]) -> None:
        """``save`` the weights after ``epoch`` (from 1) for good."""
        if distributed.rank() == 0:
            try:
                files.make_folder(self.epochs)
            except OSError as error:
                shown = printable(self.epochs)
                raise UserError(f"Cannot make the folder {shown}: {error.strerror}.") from None
        self.save(self.kept(epoch), payload)

    def add_metrics(self, line: dict[str, Any]) -> None:
        """Append one epoch's line."""
        if distributed.rank() != 0:
            return
        before = self._text(self.metrics).rpartition("\n")[0].rpartition("\n")[2]
        text = sealed.seal_line(line, f"{before}\n" if before else "")
        try:
            with files.appended(self.metrics) as file:
                file.write(text.encode())
        except OSError as error:
            raise UserError(f"Cannot write {printable(self.metrics)}: {error.strerror}.") from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines so far; a last line that a crash cut short is left out."""
        try:
            return sealed.open_lines(self._text(self.metrics))
        except sealed.Broken:
            raise UserError(
                f"{printable(self.metrics)} is damaged: a checksum does not match. Restore it, "
                "or delete it to continue without the epochs it lists."
            ) from None

    def keep_metrics_before(self, epoch: int) -> None:
        """Delete the lines of epochs that will be trained again."""
        if distributed.rank() != 0:
            return
        lines = self.read_metrics()
        kept = [line for line in lines if line["epoch"] <= epoch]
        if os.path.lexists(self.metrics) and len(kept) < epoch and not _began_later(kept):
            raise UserError(
                f"{printable(self.metrics)} has {len(kept)} of {epoch} epochs: the others are "
                "lost. Restore it, or delete it to continue without them."
            )
        text = before = ""
        for line in kept:
            before = sealed.seal_line(line, before)
            text += before
        checkpoint.write_text(self.metrics, text)

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, or None."""
        if not os.path.lexists(self.summary):
            return None
        try:
            return sealed.open_value(self._text(self.summary))
        except sealed.Broken:
            raise UserError(
                f"{printable(self.summary)} is damaged: its checksum does not match. Delete it; "
                "--resume then evaluates the run again."
            ) from None

    def _text(self, path: Path) -> str:
        """The text of ``path``, empty where there is none."""
        try:
            return files.read(path, _MOST_RECORDED).decode("utf-8")
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError):
            raise UserError(f"{printable(path)} is damaged: it cannot be read.") from None

    def forget_results(self) -> None:
        """Delete summary.json and averaged.pt before a finished run is extended."""
        if distributed.rank() == 0:
            self.summary.unlink(missing_ok=True)
            self.averaged.unlink(missing_ok=True)

    def write_summary(self, summary: dict[str, Any]) -> None:
        if distributed.rank() != 0:
            return
        checkpoint.write_text(self.summary, sealed.seal_value(summary))


def _no_run(path: str) -> str:
    """The sentence about a ``path`` that is no run folder."""
    given, shown = Path(path), printable(path)
    if os.path.isfile(given) and os.path.lexists(given.parent / "config.toml"):
        return f"{shown} is a file of a run: name its folder, {printable(given.parent)}."
    if os.path.isfile(given):
        return (
            f"{shown} holds no run, being a file: name a run folder; `fastadv evaluate` takes a "
            "file of weights as --weights, with --data and --model."
        )
    if os.path.lexists(given):
        return f"{shown} holds no run: there is no config.toml in it{_nearest(path)}"
    return f"{shown} holds no run: there is no such folder{_nearest(path)}"


def _nearest(path: str) -> str:
    """The run beside ``path`` that was probably meant, as the end of a sentence."""
    given = Path(path)
    try:
        names = [each.name for each in given.parent.iterdir() if (each / "config.toml").exists()]
    except OSError:
        names = []
    near = get_close_matches(given.name, names, n=1)
    return f"; did you mean {printable(given.with_name(near[0]))}?" if near else "."


def _began_later(lines: list[dict[str, Any]]) -> bool:
    """True if ``lines`` are all of a file that was deleted in the middle of the run."""
    epochs = [line["epoch"] for line in lines]
    return bool(epochs) and epochs == list(range(epochs[0], epochs[-1] + 1)) and epochs[0] > 1


def _free_name(config: RunConfig) -> Path:
    """runs/METHOD-DATA, or runs/METHOD-VARIANT-DATA, or with the first free number behind it."""
    named = [config.method, config.variant, config.data.split(":")[0]]
    base = Path("runs") / "-".join(part for part in named if part is not None)
    candidate, number = base, 1
    while not _claimed(candidate):
        number += 1
        candidate = base.with_name(f"{base.name}-{number}")
    return candidate


def _claimed(path: Path) -> bool:
    """True if the new run may use ``path``. A single process makes the folder, so of two runs
    started at the same moment one gets it; several processes of a run look before rank 0 writes."""
    if distributed.world_size() > 1:
        return not (path / "config.toml").exists()
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"Cannot make the folder {path}: {error.strerror}.") from None
    return True
