"""TensorBoard events of a run, where TensorBoard is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastadv.engine.process import distributed


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
        if self._writer is None:  # not before: it makes a file
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
        for name, value in line.items():
            curves = {name: value}
            if isinstance(value, (list, tuple)):
                curves = {f"{name}_low": value[0], f"{name}_high": value[1]}
            for curve, height in curves.items():
                if curve != "epoch":
                    self._writer.add_scalar(curve, height, int(line["epoch"]))
        self._writer.flush()
