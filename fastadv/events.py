"""TensorBoard events of a run, where TensorBoard is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from fastadv.engine import distributed


class Events:
    """Writes each epoch's numbers as scalars into the run folder; without TensorBoard, nothing."""

    def __init__(self, folder: Path) -> None:
        self._writer = None
        installed = importlib.util.find_spec("tensorboard") is not None
        if installed and distributed.rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder))

    def add(self, line: Mapping[str, float]) -> None:
        """``line`` as ``metrics.jsonl`` has it; "epoch" is the step of the curves."""
        if self._writer is None:
            return
        for name, value in line.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, int(line["epoch"]))
        self._writer.flush()
