"""A file of TensorBoard events, written at once: ``SummaryWriter`` writes in a thread, where a full
disk ends in a traceback or a wait without end."""

from __future__ import annotations

import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


class EventFile:
    """A new file of events in ``folder``. Every method raises ``OSError`` as writing does."""

    def __init__(self, folder: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        now = time.time()
        unique = f"{os.getpid()}.{secrets.token_hex(4)}"
        name = f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{unique}"
        self._event = Event
        self._file = open(Path(folder) / name, "xb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=now, file_version="brain.Event:2"))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Add a point of the curve ``name``."""
        from torch.utils.tensorboard.summary import scalar

        event = self._event(wall_time=time.time(), step=step, summary=scalar(name, value))
        self._write(event)

    def add_text(self, name: str, text: str, step: int) -> None:
        """Add ``text``, in Markdown."""
        from torch.utils.tensorboard.summary import text as as_summary

        self._write(self._event(wall_time=time.time(), step=step, summary=as_summary(name, text)))

    def flush(self) -> None:
        """Give what was added to the system."""
        self._records.flush()

    def close(self) -> None:
        """Close the file, whatever became of it."""
        with suppress(OSError):
            self._file.close()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
