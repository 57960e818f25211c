"""TensorBoard events of a run, where TensorBoard is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastadv.engine.process import distributed
from fastadv.errors import warn
from fastadv.run.epoch_metrics import percent
from fastadv.run.event_file import EventFile
from fastadv.storage import files
from fastadv.storage.printable import printable


class Events:
    """Writes the scalars of each epoch, the settings and the final scores into the run folder; does
    nothing without TensorBoard.

    A file that cannot be written (a full disk) is told once, and gets nothing more: the numbers of
    a run are in metrics.jsonl.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: EventFile | None = None
        installed = importlib.util.find_spec("tensorboard") is not None
        self._writes = installed and distributed.rank() == 0

    def begin(self, settings: str) -> None:
        """Add the settings of the run, as config.toml has them."""
        with self._file() as file:
            if file is not None:
                file.add_text("settings", f"```\n{settings}```", 0)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line of ``metrics.jsonl``. Its "epoch" is the step of the curves; each end of an
        interval is a curve of its own."""
        with self._file() as file:
            if file is None:
                return
            for name, value in line.items():
                curves = {name: value}
                if isinstance(value, (list, tuple)):
                    curves = {f"{name}_low": value[0], f"{name}_high": value[1]}
                for curve, height in curves.items():
                    if curve != "epoch":
                        file.add_scalar(curve, height, int(line["epoch"]))

    def finish(self, summary: Mapping[str, Any], epochs: int) -> None:
        """Add the final scores of ``summary``, in percent, at the last of ``epochs`` epochs:
        ``test/best/pgd-20_percent`` and so on."""
        with self._file() as file:
            for which in ("best", "last"):
                for name, share in (summary[which] or {}).items():
                    if file is not None:
                        file.add_scalar(f"test/{which}/{name}_percent", percent(share), epochs)

    @contextmanager
    def _file(self) -> Iterator[EventFile | None]:
        """The file, written out at the end; None where nothing is written."""
        file = self._opened()
        try:
            yield file
            if file is not None:
                file.flush()
        except OSError as error:
            self._give_up(error)

    def _opened(self) -> EventFile | None:
        if self._writes and self._writer is None:  # not before: it makes a file
            try:
                self._writer = EventFile(str(self._folder))
            except OSError as error:
                self._give_up(error)
        return self._writer if self._writes else None

    def _give_up(self, error: OSError) -> None:
        self._writes = False
        if self._writer is not None:
            self._writer.close()
        warn(
            f"TensorBoard's file in {printable(self._folder)} cannot be written "
            f"({files.reason(error)}); it gets no more numbers. metrics.jsonl has them all."
        )
