"""TensorBoard events of a run, where TensorBoard is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastadv.engine.process import distributed
from fastadv.errors import warn
from fastadv.run.event_file import EventFile
from fastadv.storage import files
from fastadv.storage.printable import printable


class Events:
    """Writes the scalars of each epoch into the run folder; does nothing without TensorBoard."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        installed = importlib.util.find_spec("tensorboard") is not None
        self._writes = installed and distributed.rank() == 0

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line of ``metrics.jsonl``. Its "epoch" is the step of the curves; each end of an
        interval is a curve of its own."""
        if not self._writes:
            return
        try:
            self._add(line)
        except OSError as error:
            self._writes = False
            if self._writer is not None:
                self._writer.close()
            warn(
                f"TensorBoard's file in {printable(self._folder)} cannot be written "
                f"({files.reason(error)}); it gets no more numbers. metrics.jsonl has them all."
            )

    def _add(self, line: Mapping[str, Any]) -> None:
        if self._writer is None:  # not before: it makes a file
            self._writer = EventFile(str(self._folder))
        for name, value in line.items():
            curves = {name: value}
            if isinstance(value, (list, tuple)):
                curves = {f"{name}_low": value[0], f"{name}_high": value[1]}
            for curve, height in curves.items():
                if curve != "epoch":
                    self._writer.add_scalar(curve, height, int(line["epoch"]))
        self._writer.flush()
