"""What a run writes of itself as it goes: its checkpoints, and the weights of an epoch."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from fastadv.engine.process import distributed, stop
from fastadv.run import provenance
from fastadv.run.epoch_metrics import EpochMetrics
from fastadv.run.guard import Guard
from fastadv.run.keeping import kept
from fastadv.run.run_folder import RunFolder
from fastadv.run.saved_run import Progress, contents, made_for, provenance_of
from fastadv.run.session import Session
from fastadv.run.way_on import continued


class Saving:
    """Writes the run of ``session`` into ``folder``; ``metrics`` are those of the epoch so far."""

    def __init__(
        self,
        session: Session,
        folder: RunFolder,
        progress: Progress,
        metrics: EpochMetrics,
        guard: Guard | None,
    ) -> None:
        self.session, self.folder, self.progress = session, folder, progress
        self.kept = kept(session.config.keep)
        self._metrics, self._guard = metrics, guard
        self._provenance = provenance_of(session)
        self._saved_at = time.monotonic()

    def last(self, extra_seconds: float = 0.0) -> None:
        """Write last.pt; ``extra_seconds`` of training are not in the progress yet."""
        progress = replace(self.progress, train_seconds=self.progress.train_seconds + extra_seconds)
        began = time.monotonic()
        self.folder.save_last(self._contents(progress), keep_previous=self.kept.previous)
        self._saved_at = time.monotonic()
        stop.saved_in(self._saved_at - began)

    def guarded(self) -> None:
        """Write the state to which the run goes back if it overfits."""
        self.folder.save(self.folder.guarded, self._contents(self.progress))

    def is_due(self) -> bool:
        """True once ``checkpoint_minutes`` have passed since the last checkpoint."""
        minutes = (time.monotonic() - self._saved_at) / 60
        return minutes >= self.session.config.checkpoint_minutes

    def between_steps(self) -> str:
        """Save the run after something beside its updates went wrong, and return how to continue;
        "" if nothing was trained. Several processes cannot, since one of them is not asked."""
        step = self.session.step
        if distributed.world_size() > 1 or not step.calls or not step.healthy():
            return ""
        self.last()
        return f"The run is saved; {continued(self.folder.path)}"

    def weights(self, epoch: int) -> dict[str, Any]:
        """The session's weights, those after ``epoch`` (from 1), and of which run they are."""
        return {
            "model": self.session.model.state_dict(),
            "epoch": epoch,
            **made_for(self.session),
            "configuration": provenance.configuration(self.session.config),
        }

    def _contents(self, progress: Progress) -> dict[str, Any]:
        found = contents(self.session, progress, self._metrics.state(), self._provenance)
        if self._guard is not None:
            found["guard"] = self._guard.state()
        return found
