"""A run whose device is full: it is saved, and says which batch would fit."""

from __future__ import annotations

from fastadv.engine.process import distributed
from fastadv.errors import TrainingError, UserError
from fastadv.run.epoch_loop import EpochLoop
from fastadv.run.trial_steps import next_smaller
from fastadv.training.memory import OutOfMemory, free_frames


def explained(error: BaseException, runner: EpochLoop) -> Exception:
    """The sentence about ``error``, which says that memory is full; the run has been saved. A run
    that has made no update leaves its folder free (``UserError``)."""
    free_frames(error)
    session = runner.session
    saved = runner.saving.between_steps()
    where = f"Out of memory on {session.device} "
    if not isinstance(error, OutOfMemory):
        return TrainingError(
            f"{where}after step {session.step.calls}, not in a step but beside it (evaluation, "
            f"data, saving). {saved or 'Nothing was saved.'}"
        )
    size = session.config.batch_size
    found = None if distributed.world_size() > 1 else next_smaller(session, size)
    smaller = "a smaller --batch-size" if found is None else f"--batch-size {found}, which fits"
    sentence = f"{where}in step {session.step.calls} with a batch of {size} images: take {smaller}"
    if not session.step.calls:
        return UserError(f"{sentence}.")
    return TrainingError(f"{sentence}, into another --out. {saved}")
