"""A run's folder: config.toml, metrics.jsonl, last.pt, best.pt, summary.json.

Where a recipe averages weights, averaged.pt holds those that were judged last; last.pt goes on
with the live ones.

Of several processes the first one writes; the others read what it wrote.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastadv import checkpoint
from fastadv.config import TrainConfig, from_toml, to_toml
from fastadv.engine import distributed
from fastadv.errors import UserError


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.last = path / "last.pt"
        self.best = path / "best.pt"
        self.last_good = path / "last_good.pt"
        self.averaged = path / "averaged.pt"
        self.summary = path / "summary.json"

    @classmethod
    def create(cls, out: str | None, config: TrainConfig) -> RunFolder:
        """A new folder holding the settled configuration; one that holds a run is refused."""
        path = Path(out) if out else _free_name(config)
        folder = cls(path)
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
            checkpoint.write_text(folder.config, to_toml(config))
        distributed.wait()
        return folder

    @classmethod
    def open(cls, path: str) -> RunFolder:
        """The folder of a run that exists."""
        folder = cls(Path(path))
        if not folder.config.is_file():
            raise UserError(f"{path} holds no run: there is no config.toml in it.")
        return folder

    def read_config(self) -> TrainConfig:
        return from_toml(self.config)

    def save(self, path: Path, payload: dict[str, Any]) -> None:
        """``checkpoint.save``; afterwards every process can read it."""
        if distributed.rank() == 0:
            checkpoint.save(path, payload)
        distributed.wait()

    def add_metrics(self, line: dict[str, Any]) -> None:
        """Append one epoch's line."""
        if distributed.rank() != 0:
            return
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines so far; a last line that a crash cut short is left out."""
        if not self.metrics.exists():
            return []
        lines = []
        for text in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines

    def keep_metrics_before(self, epoch: int) -> None:
        """Forget lines of epochs that will be trained again."""
        if distributed.rank() != 0:
            return
        kept = [line for line in self.read_metrics() if line["epoch"] <= epoch]
        checkpoint.write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def read_summary(self) -> dict[str, Any] | None:
        """What a finished run found, or None."""
        try:
            found: dict[str, Any] = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found

    def forget_results(self) -> None:
        """Of a run that goes on: what it found when it was shorter."""
        if distributed.rank() == 0:
            self.summary.unlink(missing_ok=True)
            self.averaged.unlink(missing_ok=True)

    def write_summary(self, summary: dict[str, Any]) -> None:
        if distributed.rank() != 0:
            return
        checkpoint.write_text(self.summary, json.dumps(summary, indent=2) + "\n")


def _free_name(config: TrainConfig) -> Path:
    """runs/METHOD-DATA, or with the first free number behind it."""
    data = config.data.split(":")[0]
    base = Path("runs") / f"{config.method}-{data}"
    candidate, number = base, 1
    while not _claimed(candidate):
        number += 1
        candidate = base.with_name(f"{base.name}-{number}")
    return candidate


def _claimed(path: Path) -> bool:
    """Whether the new run may have ``path``: alone it makes the folder, so that of two started at
    the same moment one gets it; several processes of a run look before the first one writes."""
    if distributed.world_size() > 1:
        return not (path / "config.toml").exists()
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"Cannot make the folder {path}: {error.strerror}.") from None
    return True
