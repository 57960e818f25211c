"""A run's folder: config.toml, metrics.jsonl, last.pt, previous.pt, best.pt, summary.json.

last.pt is the checkpoint from which the run continues, previous.pt the one before, for the case
that last.pt is damaged (``fastadv.run.recovery``). lock says which process trains.

guarded.pt is the state to which an overfitted run goes back, last_good.pt the weights before an
update that was not finite; both are removed once the run has finished.

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
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fastadv.data import is_tree
from fastadv.data.array_file import user_cache
from fastadv.engine.process import distributed
from fastadv.errors import UserError
from fastadv.models.packaged import names_own_code
from fastadv.run import places
from fastadv.run.config import RunConfig
from fastadv.run.config_file import MOST_BYTES, of_a_run, places_text, to_toml
from fastadv.run.request import RunRequest, setting_types
from fastadv.run.resolve import resolve_stored
from fastadv.run.way_on import continued
from fastadv.storage import checkpoint, files, sealed, trust
from fastadv.storage.lock import Lock
from fastadv.storage.printable import printable

_MOST_RECORDED = 8 << 20  # bytes of metrics.jsonl and of summary.json


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.last = path / "last.pt"
        self.previous = path / "previous.pt"
        self.best = path / "best.pt"
        self.last_good = path / "last_good.pt"
        self.guarded = path / "guarded.pt"  # the state to which an overfitted run goes back
        self.averaged = path / "averaged.pt"
        self.epochs = path / "epochs"
        self.summary = path / "summary.json"
        self.evaluations = path / "evaluations.jsonl"
        self.verdicts = path / "verdicts"
        self.unfinished = path / "evaluations.partial"
        self.lock = path / "lock"
        self.made = False  # the folder did not exist before this run
        self._lock = Lock(self.lock, f"trains in {printable(path)}")
        self.own = False  # this user began the run here, as far as ``read_config`` has seen

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
        folder._require_new()
        distributed.wait()  # all have looked before one writes
        if distributed.rank() == 0:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"Cannot make the folder {printable(path)}: {files.reason(error)}."
                ) from None
            try:
                folder._take_lock()
                folder._require_new()  # another process may have begun one meanwhile
                folder._begin(_asked(config))
            except BaseException:
                folder._leave()
                raise
        distributed.wait()
        return folder

    def _begin(self, request: RunRequest) -> None:
        try:
            self._write_config(request, own=True)
        except BaseException:
            with suppress(OSError):  # there, but perhaps not on the disk
                self.config.unlink(missing_ok=True)
            raise

    def _require_new(self) -> None:
        if self.path.is_file():
            raise UserError(f"{printable(self.path)} is a file; --out names a folder.")
        if self.config.exists():
            shown = printable(self.path)
            raise UserError(
                f"{shown} already holds a run; continue it with --resume {shown} or choose another "
                "--out or --name."
            )
        for saved in (self.last, self.previous):
            if os.path.lexists(saved):
                raise UserError(
                    f"{printable(saved)} is there without the {self.config.name} of its run: "
                    "restore that file, or choose another --out or --name."
                )
        if os.path.lexists(self.summary):
            raise UserError(
                f"{printable(self.summary)} is there without the run that it is of, as where "
                "several seeds were trained: choose another --out or --name."
            )

    def _write_config(self, request: RunRequest, *, own: bool) -> None:
        """Write config.toml; ``own``: this user began the run, which is noted first, since a run
        killed between the two would be taken for another user's."""
        text = to_toml(request) + places_text(places.seen_from(self.path, request))
        content = sealed.seal_text(text)
        if own:
            trust.remember(self.path, content.encode())
        checkpoint.write_text(self.config, content)

    def note(self, told: Mapping[str, Any], evaluation: Mapping[str, Any]) -> None:
        """Write into config.toml where the run's things are now, as the user has ``told``, and the
        settings by which it is evaluated from now on."""
        if distributed.rank() != 0:
            return
        content = self._content()
        own = trust.is_noted(self.path, content)
        request, beside = of_a_run(content, self.config)
        request = places.found_again(request, beside, self.path, told)
        self._write_config(dataclasses.replace(request, **evaluation), own=own)

    def forget_unbegun(self) -> None:
        """Remove the configuration of a run that was refused before its first update, so that a
        corrected one can take the folder. The folder is also removed, as soon as the run leaves
        it, if ``create`` made it."""
        begun = any(file.exists() for file in self.files() if file not in (self.config, self.lock))
        if not begun and distributed.rank() == 0:
            with suppress(OSError):  # as in a folder that became read-only
                self.config.unlink(missing_ok=True)

    @classmethod
    def open(cls, path: str) -> RunFolder:
        """The folder of an existing run."""
        folder = cls(Path(path))
        if not os.path.lexists(folder.config):
            raise UserError(_no_run(path))
        return folder

    def read_config(
        self, told: Mapping[str, Any] | None = None, needs: Collection[str] = ()
    ) -> RunConfig:
        """The configuration of the run, complete and checked.

        ``told`` are the places of things that have moved, as the user names them, and ``needs``
        the places where something must be (``fastadv.run.places``). If this user did not begin the
        run here, code that it names is refused, and nothing is written to a path that it names or
        downloaded.
        """
        content = self._content()
        request, beside = of_a_run(content, self.config)
        request = places.found_again(request, beside, self.path, told or {})
        unchanged = sealed.is_sealed(content)  # ``of_a_run`` has checked it
        config = resolve_stored(request, beside.get(places.PLUGINS, ()), unchanged=unchanged)
        places.require(request, beside, self.path, needs)
        if names_own_code(config.model):
            trust.require(self.path, content, f"model {config.model}")
        self.own = trust.is_own(self.path, content)
        if self.own:
            return config
        if is_tree(config.data) and not (told or {}).get("data_root"):
            # Packed images would be written there.
            config = dataclasses.replace(config, data_root=str(user_cache()))
        return dataclasses.replace(config, download=False)

    def require_trusted(self, named: str) -> None:
        """Raise ``UserError`` unless the code that config.toml names, such as "model
        module:callable", may be called."""
        trust.require(self.path, self._content(), named)

    def _content(self) -> bytes:
        try:
            return files.read(self.config, MOST_BYTES)
        except OSError as error:
            raise UserError(f"Cannot read {printable(self.config)}: {error.strerror}.") from None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Raises ``UserError`` if another process trains in this folder, and where its files
        cannot be written."""
        if distributed.rank() != 0:
            yield
            return
        self._take_lock()
        try:
            yield
        except checkpoint.NotWrittenError as error:
            if not os.path.lexists(self.config):
                raise
            raise UserError(f"{error} Once it can be written, {continued(self.path)}") from None
        finally:
            self._leave()

    def _take_lock(self) -> None:
        try:
            self._lock.take()
        except OSError as error:
            raise UserError(
                f"Cannot write in {printable(self.path)}: {files.reason(error)}. A run needs its "
                "folder to write to."
            ) from None

    def _leave(self) -> None:
        """Release the lock; remove the folder if ``create`` made it for a run that was refused."""
        self._lock.release()
        if self.made and not os.path.lexists(self.config):
            with suppress(OSError):  # something is in it
                self.path.rmdir()

    def save(self, path: Path, payload: dict[str, Any]) -> None:
        """``checkpoint.save``; afterwards every process can read it."""
        if distributed.rank() == 0:
            checkpoint.save(path, payload)
        distributed.wait()

    def save_last(self, payload: dict[str, Any], *, keep_previous: bool) -> None:
        """``save`` last.pt; the one before is previous.pt from then on if ``keep_previous``."""
        if distributed.rank() == 0:
            checkpoint.save(self.last, payload, self.previous if keep_previous else None)
        distributed.wait()

    def remove(self, *paths: Path) -> None:
        """Remove files of the run that are there, and with its last file the folder of the
        evaluations under way."""
        if distributed.rank() != 0:
            return
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(
                    f"Cannot remove {printable(path)}: {files.reason(error)}."
                ) from None
        with suppress(OSError):  # other files are in it
            self.unfinished.rmdir()

    def keep(self, epoch: int, payload: dict[str, Any]) -> None:
        """``save`` the weights after ``epoch`` (from 1) for good."""
        if distributed.rank() == 0:
            try:
                files.make_folder(self.epochs)
            except OSError as error:
                shown = printable(self.epochs)
                raise UserError(f"Cannot make the folder {shown}: {files.reason(error)}.") from None
        self.save(self.kept(epoch), payload)

    def add_metrics(self, line: dict[str, Any]) -> None:
        """Append one epoch's line."""
        if distributed.rank() != 0:
            return
        # A run is not ended by damage to the lines before; who reads them is told.
        before = self._text(self.metrics, "replace").rpartition("\n")[0].rpartition("\n")[2]
        text = sealed.seal_line(line, f"{before}\n" if before else "")
        try:
            with files.appended(self.metrics) as file:
                file.write(text.encode())
        except OSError as error:
            raise checkpoint.not_written(error, self.metrics) from None

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
        if text != self._text(self.metrics):
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

    def _text(self, path: Path, errors: str = "strict") -> str:
        """The text of ``path``, empty where there is none. Raises ``sealed.Broken`` for bytes that
        are no text, unless ``errors`` says what becomes of them."""
        try:
            return files.read(path, _MOST_RECORDED).decode("utf-8", errors)
        except FileNotFoundError:
            return ""
        except UnicodeDecodeError:
            raise sealed.Broken from None
        except OSError as error:
            raise UserError(f"Cannot read {printable(path)}: {files.reason(error)}.") from None

    def forget_results(self) -> None:
        """Delete summary.json and averaged.pt before a finished run is extended."""
        self.remove(self.summary, self.averaged)

    def write_summary(self, summary: dict[str, Any]) -> None:
        if distributed.rank() != 0:
            return
        checkpoint.write_text(self.summary, sealed.seal_value(summary))


def _asked(config: RunConfig) -> RunRequest:
    settings = {name: getattr(config, name) for name in setting_types()}
    return RunRequest(**settings, options=config.options)


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


def usual_place(config: RunConfig) -> Path:
    """The folder of a run that names none, if no other run has it."""
    named = [config.method, config.variant, config.data.split(":")[0]]
    return Path("runs") / "-".join(part for part in named if part is not None)


def _free_name(config: RunConfig) -> Path:
    """runs/METHOD-DATA, or runs/METHOD-VARIANT-DATA, or with the first free number behind it."""
    base = usual_place(config)
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
        raise UserError(
            f"Cannot make the folder {printable(path)}: {files.reason(error)}."
        ) from None
    return True
