"""Damage to one file of a run folder, and what the run then does about it.

Most damage leaves a run in one of few states: the same checkpoint, the one before, no best weights.
Whether it is noticed is looked at every time; a run is finished for each state, and now and then.
"""

from __future__ import annotations

import io
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rich.console
from kept_runs import require_same

from fastadv.errors import UserError
from fastadv.run.console import Console
from fastadv.run.run_folder import RunFolder
from fastadv.run.train import resume
from fastadv.storage import checkpoint
from fastadv.storage.digests import digest

WAYS = ("cut", "flip", "gone")
FINISHED_EVERY = 40  # trials


def damage(path: Path, way: str, draw: random.Random) -> None:
    """Cut ``path`` short, flip one of its bits, or remove it; not what else has its content."""
    content = bytearray(path.read_bytes())
    path.unlink()
    if way == "gone":
        return
    if way == "cut":
        content = content[: draw.randrange(len(content))]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


@dataclass
class Harness:
    """Damages copies of ``run`` in ``place``; finished, they must be as ``whole``."""

    run: Path
    whole: Path
    place: Path
    finishes: bool = True
    counts: Counter[str] = field(default_factory=Counter)
    _finished: set[Any] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._digests = {
            path.relative_to(self.run): digest(checkpoint.load(path))
            for path in self.run.rglob("*.pt")
        }
        self.names = sorted(
            path.relative_to(self.run) for path in self.run.rglob("*") if path.is_file()
        )

    def trial(self, name: Path, way: str, number: int) -> None:
        """Damage the file ``name``; raises ``AssertionError`` for anything but a sentence."""
        folder = self.place / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.run, folder)
        damage(folder / name, way, random.Random(number))
        noticed = self._is_noticed(folder, name)
        self.counts[f"{way}: {'noticed' if noticed else 'without effect'}"] += 1
        if way == "gone" and name.suffix == ".pt":
            assert noticed, name
        if not self.finishes:
            return
        state = (name.name, way if name.suffix != ".pt" else "", noticed)
        if state not in self._finished or number % FINISHED_EVERY == 0:
            self._finished.add(state)
            self._finish(folder, name)

    def _is_noticed(self, folder: Path, name: Path) -> bool:
        """True if reading the file says so in one sentence. Else what is read is as it was."""
        place, own = RunFolder(folder), RunFolder(self.run)
        try:
            if name.suffix == ".pt":
                assert digest(checkpoint.load(folder / name)) == self._digests[name], name
            elif name.name == "config.toml":
                assert RunFolder.open(str(folder)).read_config() == own.read_config()
            elif name.name == "metrics.jsonl":
                lines = place.read_metrics()
                # A last line that a crash cut short is left out; the run notices what is missing.
                assert lines == own.read_metrics()[: len(lines)]
                return len(lines) < len(own.read_metrics())
            elif name.name == "summary.json":
                found = place.read_summary()
                assert found in (None, own.read_summary())
                return found is None
        except UserError:
            return True
        return False

    def _finish(self, folder: Path, name: Path) -> None:
        """Resume the damaged run, following the advice it gives, and compare it with the whole."""
        self.counts["runs finished after it"] += 1
        said = io.StringIO()
        console = Console(rich.console.Console(file=said, width=200))
        for _ in range(2):
            try:
                summary = resume(str(folder), console)
                break
            except UserError as error:
                sentence = str(error)
            assert "\n" not in sentence
            self.counts["of them after the advice was followed"] += 1
            if name.name == "config.toml":
                assert any(word in sentence for word in ("estore", "holds no run", "delete"))
                shutil.copy(self.run / name, folder / name)
            else:
                assert name.name in sentence
                assert "elete it" in sentence
                (folder / name).unlink()
        else:
            raise AssertionError(f"{name}: {sentence}")
        if summary["best"] is None:
            assert name.name == "best.pt"
            assert "last weights alone" in " ".join(said.getvalue().split())
            self.counts["of them without their best weights, as told"] += 1
            return
        if name.name == "metrics.jsonl":  # the lines before are lost, and this was said
            lines = (folder / name).read_text().splitlines() if (folder / name).exists() else []
            assert len(lines) <= len((self.whole / name).read_text().splitlines())
            shutil.copy(self.whole / name, folder / name)
        damaged_for_good = name.suffix == ".pt" and not self._repaired(folder, name)
        if damaged_for_good:
            shutil.copy(self.whole / name, folder / name)
        require_same(folder, self.whole)

    def _repaired(self, folder: Path, name: Path) -> bool:
        try:
            checkpoint.load(folder / name)
        except UserError:
            # A finished run reads its last checkpoint alone.
            assert name.name != "last.pt"
            return False
        return True
