"""TensorBoard events of a run, where TensorBoard is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastadv.engine.process import distributed
from fastadv.run.epoch_metrics import percent


class Events:
    """Writes the scalars of each epoch, the settings and the final scores into the run folder; does
    nothing without TensorBoard."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        installed = importlib.util.find_spec("tensorboard") is not None
        self._writes = installed and distributed.rank() == 0

    def begin(self, settings: str) -> None:
        """Add the settings of the run, as config.toml has them."""
        if self._writes:
            self._opened().add_text("settings", f"```\n{settings}```", 0)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line of ``metrics.jsonl``. Its "epoch" is the step of the curves; each end of an
        interval is a curve of its own."""
        for name, value in line.items():
            curves = {name: value}
            if isinstance(value, (list, tuple)):
                curves = {f"{name}_low": value[0], f"{name}_high": value[1]}
            for curve, height in curves.items():
                if curve != "epoch":
                    self._scalar(curve, height, int(line["epoch"]))
        self._flush()

    def finish(self, summary: Mapping[str, Any], epochs: int) -> None:
        """Add the final scores of ``summary``, in percent, at the last of ``epochs`` epochs:
        ``test/best/pgd-20_percent`` and so on."""
        for which in ("best", "last"):
            for name, share in summary[which].items():
                self._scalar(f"test/{which}/{name}_percent", percent(share), epochs)
        self._flush()

    def _scalar(self, name: str, height: float, epoch: int) -> None:
        if self._writes:
            self._opened().add_scalar(name, height, epoch)

    def _flush(self) -> None:
        if self._writes:
            self._opened().flush()

    def _opened(self) -> Any:
        if self._writer is None:  # not before: it makes a file
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
        return self._writer
